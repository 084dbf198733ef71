use super::*;
use crate::testing::{Rng, all_types, batch};
use arrow::array::{Float64Array, Int64Array, StringArray, TimestampMicrosecondArray};
use arrow::datatypes::Float64Type;
use rakam_event::schema::{Schema, USER};
use rakam_event::types::FieldType;

#[test]
fn batches_round_trip() {
    let schema = all_types();
    let mut rng = Rng::new(21);
    for n in [1, 2, 63, 64, 65, 1000] {
        let rows = batch(&schema, n, &mut rng);
        let chunk = Bytes::from(encode(&rows, 7).unwrap());
        let back = decode(chunk.clone()).unwrap();
        assert_eq!(back, rows);
        assert_eq!(back.schema(), schema.arrow());
        assert_eq!(schema_version(chunk).unwrap(), 7);
    }
}

#[test]
fn sliced_batches_round_trip() {
    let schema = all_types();
    let rows = batch(&schema, 500, &mut Rng::new(22)).slice(123, 200);
    assert_eq!(decode(encode(&rows, 1).unwrap().into()).unwrap(), rows);
}

#[test]
fn projection_is_by_field_id() {
    let schema = all_types();
    let rows = batch(&schema, 100, &mut Rng::new(23));
    let chunk = Bytes::from(encode(&rows, 1).unwrap());
    let ids = [XID, TIME, "f.15 double precision[]", "f.8 text"]
        .map(|name| field_id(schema.arrow().field_with_name(name).unwrap()).unwrap());
    let wanted = [ids[0], ids[1], 4_000, ids[2], ids[3]];
    let back = decode_projected(chunk.clone(), &wanted).unwrap();
    let positions: Vec<usize> = ids
        .iter()
        .map(|&id| {
            let arrow = schema.arrow();
            arrow
                .fields()
                .iter()
                .position(|f| field_id(f) == Some(id))
                .unwrap()
        })
        .collect();
    assert_eq!(back, rows.project(&positions).unwrap());
    let none = decode_projected(chunk, &[]).unwrap();
    assert_eq!((none.num_columns(), none.num_rows()), (0, 100));
}

#[test]
fn info_is_that_of_the_rows() {
    let schema = Schema::new(1, Vec::new());
    let rows = batch(&schema, 100, &mut Rng::new(24));
    let info = info(&rows).unwrap();
    let times = rows.column(0).as_primitive::<TimestampMicrosecondType>();
    assert_eq!(info.n, 100);
    assert_eq!(Some(info.min_time_us), times.values().iter().min().copied());
    assert_eq!(Some(info.max_time_us), times.values().iter().max().copied());
    assert_eq!(info.max_xid - info.min_xid, 99);
    assert!(super::info(&rows.slice(0, 0)).is_err());
    let ids: Vec<usize> = (1..rows.num_columns()).collect();
    assert!(super::info(&rows.project(&ids).unwrap()).is_err());
}

#[test]
fn merge_lines_fields_up_by_id() {
    let new = all_types();
    let mut old = all_types();
    old.fields.retain(|f| f.id % 2 == 0 || f.id < 16);
    // A renamed field keeps its id.
    old.fields[10].name = "renamed".into();
    let mut rng = Rng::new(25);
    let (a, b) = (batch(&old, 10, &mut rng), batch(&new, 20, &mut rng));
    let merged = merge(&[a.clone(), b.clone()], new.arrow()).unwrap();
    assert_eq!(merged.num_rows(), 30);
    assert_eq!(merged.slice(10, 20), b);
    for (i, field) in new.fields.iter().enumerate() {
        let column = merged.column(i).slice(0, 10);
        match old.fields.iter().position(|f| f.id == field.id) {
            Some(j) => assert_eq!(&column, a.column(j)),
            None => assert_eq!(column.null_count(), 10),
        }
    }
    assert_eq!(merge(&[], new.arrow()).unwrap().num_rows(), 0);
    let mut other = new.clone();
    other.fields[12].ty = rakam_event::types::FieldType::Text;
    let error = merge(&[b], other.arrow()).unwrap_err();
    assert_eq!(error.sqlstate(), "XX001");
}

#[test]
fn values_of_newer_fields_leave_extra() {
    let field = |id, name: &str, ty| EventField {
        id,
        name: name.to_owned(),
        ty,
        added_version: id - 15,
        column_ready: false,
    };
    let origin = crate::row_chunk::Origin {
        received_at_us: 1_700_000_000_000_000,
        shift_us: 0,
        xid: 7,
        rules: crate::row_chunk::Rules {
            time_past_us: 0,
            time_future_us: 0,
            max_string_bytes: 1_000,
        },
    };
    let mut rows = Rows::default();
    for event in [
        r#"{"n":1,"late":"7","other":true}"#,
        r#"{"n":2,"late":"no"}"#,
        r#"{"n":3,"late":8}"#,
        r#"{"n":4}"#,
    ] {
        rows.push(event, origin);
    }
    let old = Schema::new(1, vec![field(16, "n", FieldType::Float8)]);
    let mut new = old.clone();
    new.fields.push(field(17, "late", FieldType::Int4));
    let arrow = encode(&of_rows(&rows, &old).unwrap(), 1).unwrap();
    let text = rows.encode(1).unwrap();
    let read = |format, chunk: &[u8], schema| {
        super::read(format, Bytes::copy_from_slice(chunk), schema).unwrap()
    };
    for schema in [&old, &new] {
        let columns = read(ChunkFormat::Arrow, &arrow, schema);
        assert_eq!(columns, read(ChunkFormat::Rows, &text, schema));
        assert_eq!(columns.schema(), schema.arrow());
    }
    let upgraded = read(ChunkFormat::Arrow, &arrow, &new);
    let extra = upgraded
        .column_by_name(EXTRA)
        .unwrap()
        .as_string::<i32>()
        .clone();
    let left: Vec<Option<&str>> = extra.iter().collect();
    assert_eq!(
        left,
        [
            Some(r#"{"other":true}"#),
            Some(r#"{"late":"no"}"#),
            None,
            None
        ]
    );
    // Another field had the name before: its values are not those of this one.
    let dropped = rakam_event::schema::DroppedField {
        name: "late".to_owned(),
        xid: 8,
        at_us: origin.received_at_us + 1,
        own_since_us: i64::MIN,
    };
    let renewed = new.clone().with_dropped(vec![dropped]);
    let columns = read(ChunkFormat::Arrow, &arrow, &renewed);
    assert_eq!(columns, read(ChunkFormat::Rows, &text, &renewed));
    assert_eq!(columns.column_by_name("late").unwrap().null_count(), 4);
}

#[test]
fn columns_without_values_are_left_out() {
    let schema = all_types();
    let whole = batch(&schema, 50, &mut Rng::new(28));
    let only = |keep: &[&str]| {
        let columns = whole
            .schema()
            .fields()
            .iter()
            .zip(whole.columns())
            .map(|(field, column)| {
                if !keep.contains(&field.name().as_str()) {
                    new_null_array(field.data_type(), 50)
                } else if field.name() == EXTRA {
                    Arc::new(StringArray::from(vec![r#"{"a":1}"#; 50])) as ArrayRef
                } else {
                    Arc::clone(column)
                }
            })
            .collect();
        RecordBatch::try_new(whole.schema(), columns).unwrap()
    };
    let names = |batches: &[RecordBatch]| -> Vec<Vec<String>> {
        let lean = without_empty_columns(batches).unwrap();
        let names = |batch: &RecordBatch| {
            let schema = batch.schema();
            schema.fields().iter().map(|f| f.name().clone()).collect()
        };
        lean.iter().map(names).collect()
    };
    let bare = only(&[TIME, RECEIVED_AT, XID]);
    assert_eq!(
        names(std::slice::from_ref(&bare)),
        [[TIME, RECEIVED_AT, EXTRA, XID]]
    );
    // What one batch has, all have.
    let used = only(&[TIME, RECEIVED_AT, XID, "_user"]);
    assert_eq!(
        names(&[bare, used.clone()]),
        [[TIME, "_user", RECEIVED_AT, EXTRA, XID]; 2]
    );
    // A reader would look for a missing field in `_extra`.
    let extra = only(&[TIME, RECEIVED_AT, XID, EXTRA]);
    let users = schema.fields.iter().filter(|f| f.is_user()).count();
    assert_eq!(names(std::slice::from_ref(&extra))[0].len(), 4 + users);
    // Readers see the same events.
    let stored = encode(
        &without_empty_columns(std::slice::from_ref(&used)).unwrap()[0],
        1,
    )
    .unwrap();
    assert_eq!(
        super::read(ChunkFormat::Arrow, stored.into(), &schema).unwrap(),
        used
    );
    assert!(without_empty_columns(&[]).unwrap().is_empty());

    // Batches that are lean each for itself get the columns of all.
    let lean = |batch: &RecordBatch| without_empty_columns(std::slice::from_ref(batch)).unwrap();
    let bare = only(&[TIME, RECEIVED_AT, XID]);
    let parts = [lean(&bare), lean(&used), lean(&bare)].concat();
    let same = of_same_columns(parts, &schema).unwrap();
    assert_eq!(
        same.iter().map(RecordBatch::schema).collect::<Vec<_>>(),
        vec![lean(&used)[0].schema(); 3]
    );
    for (batch, whole) in same.iter().zip([&bare, &used, &bare]) {
        assert_eq!(&conform(batch, &schema.arrow()).unwrap(), whole);
    }
    let parts = [lean(&bare), lean(&extra)].concat();
    let same = of_same_columns(parts, &schema).unwrap();
    assert_eq!(same[0].num_columns(), 4 + users);
    assert_eq!(same[1], lean(&extra)[0]);
    assert!(of_same_columns(Vec::new(), &schema).unwrap().is_empty());
}

#[test]
fn garbage_is_an_error() {
    let schema = all_types();
    let mut rng = Rng::new(26);
    let good = encode(&batch(&schema, 50, &mut rng), 1).unwrap();
    for length in (0..good.len()).step_by(7) {
        assert!(decode(good[..length].to_vec().into()).is_err());
    }
    for _ in 0..600 {
        let mut flipped = good.clone();
        let at = rng.below(flipped.len() as u64) as usize;
        flipped[at] ^= 1 << rng.below(8);
        assert!(decode(flipped.into()).is_err());

        // Behind the checksum, as crafted bytes would be: any outcome but a crash.
        let mut crafted = good[seal::HEADER..].to_vec();
        for _ in 0..=rng.below(8) {
            let at = rng.below(crafted.len() as u64) as usize;
            crafted[at] = rng.pick(&[0, 0xff, rng_byte(at)]);
        }
        if rng.below(4) == 0 {
            crafted.truncate(rng.below(crafted.len() as u64) as usize);
        }
        let crafted = sealed(&crafted);
        let _ = decode(crafted.clone());
        let _ = decode_projected(crafted, &[1, 20, 31]);
    }
}

fn rng_byte(at: usize) -> u8 {
    Rng::new(at as u64).next() as u8
}

/// A chunk of these bytes, crafted behind the checksum.
fn sealed(payload: &[u8]) -> Bytes {
    let mut buffer = seal::start(payload.len());
    buffer.extend_from_slice(payload);
    seal::seal(buffer, MAGIC).into()
}

#[test]
fn what_claims_too_much_is_refused() {
    let rows = batch(&Schema::new(1, Vec::new()), 5000, &mut Rng::new(27));
    let good = encode(&rows, 1).unwrap()[seal::HEADER..].to_vec();
    assert_eq!(decode(sealed(&good)).unwrap(), rows);
    // The directory ends with the numbers of rows (two bytes) and of columns.
    let at = good.len() - LENGTH_BYTES - 3;
    for rows in [4_999, 5_001, 1 << 30] {
        let mut crafted = good[..at].to_vec();
        put_number(&mut crafted, rows);
        crafted.push(good[at + 2]);
        let grown = (crafted.len() - at - 3) as u32;
        let length = u32::from_le_bytes(*good.last_chunk().unwrap()) + grown;
        crafted.extend(length.to_le_bytes());
        let error = decode(sealed(&crafted)).unwrap_err().to_string();
        assert!(error.starts_with("chunk is corrupt: "), "{error}");
    }
    let mut crafted = good;
    let end = crafted.len();
    crafted[end - LENGTH_BYTES..].fill(0xff);
    assert!(decode(sealed(&crafted)).is_err());
}

#[test]
fn parts_are_one_chunk() {
    let schema = all_types();
    let mut rng = Rng::new(31);
    for (sizes, without) in [
        (&[1, 7, 300, 64][..], &[][..]),
        (&[5, 0, 5], &[USER, "f.8 text", EXTRA]),
        (&[40], &[EXTRA]),
    ] {
        let mut writer = Writer::new(vec![7; 100], 3);
        let mut added = Vec::new();
        for (part, &n) in sizes.iter().enumerate() {
            // Fields that only some parts have, or none.
            let whole = batch(&schema, n, &mut rng);
            let layout = whole.schema();
            let columns = layout.fields().iter().zip(whole.columns());
            let columns = columns
                .enumerate()
                .map(|(at, (field, column))| {
                    let stays = [TIME, RECEIVED_AT, XID].contains(&field.name().as_str());
                    let goes = without.contains(&field.name().as_str()) || (at + part) % 3 == 0;
                    match goes && !stays {
                        true => new_null_array(field.data_type(), n),
                        false => Arc::clone(column),
                    }
                })
                .collect();
            let rows = RecordBatch::try_new(whole.schema(), columns).unwrap();
            writer.add(&rows).unwrap();
            added.push(rows);
        }
        let whole = concat_batches(&schema.arrow(), &added).unwrap();
        assert_eq!(writer.rows(), whole.num_rows());
        let (found, data) = writer.finish().unwrap().unwrap();
        assert_eq!(found, info(&whole).unwrap());
        let data = Bytes::from(data);
        let lean = without_empty_columns(std::slice::from_ref(&whole)).unwrap();
        assert_eq!(decode(data.clone()).unwrap(), lean[0]);
        assert_eq!(schema_version(data.clone()).unwrap(), 3);
        let ids = [XID, "f.1 integer", "f.16 text[]", TIME]
            .map(|name| field_id(schema.arrow().field_with_name(name).unwrap()).unwrap());
        let some = decode_projected(data, &ids).unwrap();
        for column in some.schema().fields() {
            assert_eq!(
                some.column_by_name(column.name()),
                whole.column_by_name(column.name())
            );
        }
        assert!(some.num_columns() >= 3 || sizes.len() == 1);
    }
    assert!(Writer::new(Vec::new(), 1).finish().unwrap().is_none());
    let mut writer = Writer::new(Vec::new(), 1);
    writer.add(&batch(&schema, 3, &mut rng)).unwrap();
    let other = batch(&Schema::new(1, Vec::new()), 3, &mut rng);
    assert!(writer.add(&other).is_err());
}

/// Rows that have this column beside those that every event has.
fn beside(schema: &Schema, column: ArrayRef) -> RecordBatch {
    let whole = batch(schema, column.len(), &mut Rng::new(29));
    let mut columns = whole.columns().to_vec();
    columns[SYSTEM_FIELDS.len()] = column;
    RecordBatch::try_new(whole.schema(), columns).unwrap()
}

fn with_field(ty: FieldType) -> Schema {
    let field = EventField {
        id: 16,
        name: "f".into(),
        ty,
        added_version: 1,
        column_ready: true,
    };
    Schema::new(1, vec![field])
}

#[test]
fn floats_keep_their_bits() {
    let schema = with_field(FieldType::Float8);
    let edges = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        255.0,
        256.0,
        65_536.0,
        f64::from(i32::MAX),
        f64::from(i32::MIN),
        f64::from(i32::MAX) + 1.0,
        f64::from(i32::MIN) - 1.0,
        4_503_599_627_370_496.0,
        9_007_199_254_740_993.0,
        0.5,
        1e300,
        f64::MIN_POSITIVE,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::NAN,
    ];
    for a in edges {
        for b in edges {
            let values = Float64Array::from(vec![Some(a), None, Some(b), Some(7.0)]);
            let rows = beside(&schema, Arc::new(values));
            let back = decode(encode(&rows, 1).unwrap().into()).unwrap();
            let bits = |batch: &RecordBatch| -> Vec<Option<u64>> {
                let column = batch.column_by_name("f").unwrap();
                let floats = column.as_primitive::<Float64Type>();
                floats.iter().map(|v| v.map(f64::to_bits)).collect()
            };
            assert_eq!(bits(&back), bits(&rows), "{a} {b}");
        }
    }
}

#[test]
fn whole_numbers_of_any_span_come_back() {
    let spans = [0, 1, 255, 256, 65_535, 65_536, 4_294_967_295, 4_294_967_296];
    let starts = [0, -1, 1_577_934_245_000_000, i64::MIN, i64::MIN / 2];
    let units = [1, 1_000, 60_000_000, 3_600_000_000, 7];
    for ty in [FieldType::Int8, FieldType::Timestamptz] {
        let schema = with_field(ty);
        for (start, span, unit) in starts
            .into_iter()
            .flat_map(|s| spans.map(|n| (s, n)))
            .flat_map(|(s, n)| units.map(|u| (s, n, u)))
        {
            let at = |n: i64| start.wrapping_add(n.wrapping_mul(unit));
            let values = [
                Some(at(span)),
                Some(start),
                None,
                Some(at(span / 2)),
                Some(i64::MAX),
            ];
            for count in [2, 4, 5] {
                let values = Int64Array::from(values[..count].to_vec());
                let values = arrow::compute::cast(&values, &ty.arrow()).unwrap();
                let rows = beside(&schema, values);
                let back = decode(encode(&rows, 1).unwrap().into()).unwrap();
                assert_eq!(back, rows, "{start} {span} {unit}");
            }
        }
    }
}

#[test]
fn few_bytes_hold_what_repeats_or_is_small() {
    let n = 10_000;
    let bytes = |ty, column: ArrayRef| {
        let rows = beside(&with_field(ty), column);
        let field = |ids: &[i32]| {
            let all = decode(encode(&rows, 1).unwrap().into()).unwrap();
            let at: Vec<usize> = ids
                .iter()
                .map(|id| {
                    let schema = all.schema();
                    schema
                        .fields()
                        .iter()
                        .position(|f| field_id(f) == Some(*id))
                        .unwrap()
                })
                .collect();
            encode(&all.project(&at).unwrap(), 1).unwrap().len()
        };
        field(&[1, 16]) - field(&[1])
    };
    let mut rng = Rng::new(30);
    let small: Float64Array = (0..n).map(|_| Some(rng.between(-20, 200) as f64)).collect();
    assert!(bytes(FieldType::Float8, Arc::new(small)) < n + 64);
    let same: StringArray = (0..n).map(|_| Some("EWR")).collect();
    assert!(bytes(FieldType::Text, Arc::new(same)) < n / 20);
    let codes: StringArray = (0..n)
        .map(|_| Some(format!("N{:05}", rng.below(90_000))))
        .collect();
    assert!(bytes(FieldType::Text, Arc::new(codes)) < 7 * n);
    let minutes = (0..n).map(|_| 1_577_934_240_000_000 + 60_000_000 * rng.between(0, 60_000));
    let minutes = TimestampMicrosecondArray::from_iter_values(minutes).with_timezone("UTC");
    assert!(bytes(FieldType::Timestamptz, Arc::new(minutes)) < 2 * n + 64);
    let none = Float64Array::new_null(n);
    assert!(bytes(FieldType::Float8, Arc::new(none)) < n / 20);
}
