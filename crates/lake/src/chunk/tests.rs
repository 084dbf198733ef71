use super::*;
use crate::testing::{Rng, all_types, batch};
use arrow::array::StringArray;
use rakam_event::schema::Schema;
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
        let mut sealed = seal::start(crafted.len());
        sealed.extend_from_slice(&crafted);
        let sealed = Bytes::from(seal::seal(sealed, MAGIC));
        let _ = decode(sealed.clone());
        let _ = decode_projected(sealed, &[1, 20, 31]);
    }
}

fn rng_byte(at: usize) -> u8 {
    Rng::new(at as u64).next() as u8
}

#[test]
fn a_buffer_that_claims_too_much_is_refused() {
    let rows = batch(&Schema::new(1, Vec::new()), 5000, &mut Rng::new(27));
    let good = encode(&rows, 1).unwrap();
    // The size stands before the buffer's LZ4 frame.
    let frame = [0x04, 0x22, 0x4d, 0x18];
    let at = good.windows(4).position(|w| w == frame).unwrap() - 8;
    let mut crafted = good;
    crafted[at..at + 8].copy_from_slice(&(1u64 << 45).to_le_bytes());
    let mut sealed = seal::start(crafted.len());
    sealed.extend_from_slice(&crafted[seal::HEADER..]);
    let error = decode(seal::seal(sealed, MAGIC).into()).unwrap_err();
    assert!(
        error.to_string().contains("impossible buffer size"),
        "{error}"
    );
}
