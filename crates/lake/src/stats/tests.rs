use super::*;
use crate::prune::{CmpOp, Predicate, may_match};
use crate::scalar::Scalar;
use crate::testing::{Rng, all_types, batch};
use arrow::datatypes::SchemaRef;

fn of(schema: &Schema, batches: &[RecordBatch]) -> Vec<ColumnStat> {
    let mut builder = StatsBuilder::new(schema);
    for batch in batches {
        builder.update(batch).unwrap();
    }
    builder.finish()
}

/// The values of a column as scalars.
pub(super) fn scalars(ty: FieldType, column: &ArrayRef) -> Vec<Option<Scalar>> {
    macro_rules! of {
        ($array:expr, $v:ident => $scalar:expr) => {
            $array.iter().map(|v| v.map(|$v| $scalar)).collect()
        };
    }
    match ty {
        FieldType::Bool => of!(column.as_boolean(), v => Scalar::Bool(v)),
        FieldType::Int4 => of!(column.as_primitive::<Int32Type>(), v => Scalar::Int4(v)),
        FieldType::Int8 => of!(column.as_primitive::<Int64Type>(), v => Scalar::Int8(v)),
        FieldType::Float4 => of!(column.as_primitive::<Float32Type>(), v => Scalar::Float4(v)),
        FieldType::Float8 => of!(column.as_primitive::<Float64Type>(), v => Scalar::Float8(v)),
        FieldType::Numeric { scale, .. } => {
            of!(column.as_primitive::<Decimal128Type>(), v => Scalar::Numeric { unscaled: v, scale })
        }
        FieldType::Text => of!(column.as_string::<i32>(), v => Scalar::Text(v.to_owned())),
        FieldType::Date => of!(column.as_primitive::<Date32Type>(), v => Scalar::Date(v)),
        FieldType::Timestamptz => {
            of!(column.as_primitive::<TimestampMicrosecondType>(), v => Scalar::Timestamptz(v))
        }
        FieldType::Uuid => {
            of!(column.as_fixed_size_binary(), v => Scalar::Uuid(v.try_into().unwrap()))
        }
        _ => Vec::new(),
    }
}

#[test]
fn bounds_are_those_of_the_values() {
    use std::cmp::Ordering;
    let schema = all_types();
    let mut rng = Rng::new(11);
    for round in 0..200 {
        let batches: Vec<_> = (0..3)
            .map(|_| batch(&schema, 1 + round % 40, &mut rng))
            .collect();
        let stats = of(&schema, &batches);
        assert_eq!(stats.len(), schema.fields.len() + 1);
        for (i, field) in schema.fields.iter().enumerate() {
            let stat = &stats[i];
            assert_eq!(stat.field_id, field.id);
            let nulls: usize = batches.iter().map(|b| b.column(i).null_count()).sum();
            assert_eq!(stat.null_count, nulls as i64);
            let values: Vec<Scalar> = batches
                .iter()
                .flat_map(|b| scalars(field.ty, b.column(i)))
                .flatten()
                .collect();
            let bound =
                |b: &Option<Vec<u8>>| b.as_ref().map(|b| Scalar::from_bound(field.ty, b).unwrap());
            let (min, max) = (bound(&stat.min), bound(&stat.max));
            if values.is_empty() {
                assert!(min.is_none() && max.is_none());
                continue;
            }
            let min = min.unwrap();
            assert!(
                values
                    .iter()
                    .all(|v| v.compare(&min) != Some(Ordering::Less))
            );
            if let Some(max) = &max {
                assert!(
                    values
                        .iter()
                        .all(|v| v.compare(max) != Some(Ordering::Greater))
                );
            }
            if stat.exact {
                assert!(values.contains(&min) && values.contains(&max.unwrap()));
            }
        }
    }
}

#[test]
fn nans_are_counted_and_in_no_bound() {
    let mut range = Range::new(FieldType::Float8);
    let column: ArrayRef = std::sync::Arc::new(arrow::array::Float64Array::from(vec![
        f64::NAN,
        2.0,
        -f64::NAN,
        1.0,
    ]));
    assert_eq!(range.update(&column), Some(2));
    let (min, max, exact) = range.bounds();
    assert_eq!(min, Some(1f64.to_le_bytes().to_vec()));
    assert_eq!(max, Some(2f64.to_le_bytes().to_vec()));
    assert!(exact);
}

#[test]
fn long_text_is_cut_between_characters() {
    let text = format!("{}ä", "a".repeat(63));
    assert_eq!(prefix(&text), "a".repeat(63));
    assert_eq!(upper_bound(&text), Some(format!("{}b", "a".repeat(62))));
    assert_eq!(upper_bound(&"\u{10ffff}".repeat(17)), None);
    let text = format!("{}\u{10ffff}x", "a".repeat(60));
    assert_eq!(upper_bound(&text), Some(format!("{}b", "a".repeat(59))));
    let text = format!("{}\u{d7ff}xx", "a".repeat(61));
    assert_eq!(
        upper_bound(&text),
        Some(format!("{}\u{e000}", "a".repeat(61)))
    );
    assert_eq!(upper_bound(&"a".repeat(64)), Some("a".repeat(64)));
}

#[test]
fn another_schema_is_refused() {
    let schema = all_types();
    let mut builder = StatsBuilder::new(&schema);
    let other: SchemaRef = Schema::new(1, Vec::new()).arrow();
    assert!(builder.update(&RecordBatch::new_empty(other)).is_err());
}

#[test]
fn encoding_round_trips_and_survives_garbage() {
    let schema = all_types();
    let mut rng = Rng::new(12);
    for _ in 0..50 {
        let stats = of(&schema, &[batch(&schema, 30, &mut rng)]);
        let bytes = encode(&stats);
        assert_eq!(decode(&bytes).unwrap(), stats);
        for _ in 0..50 {
            // Behind the checksum, as crafted bytes would be.
            let mut bad = bytes[seal::HEADER..].to_vec();
            for _ in 0..=rng.below(4) {
                let at = rng.below(bad.len() as u64) as usize;
                bad[at] = rng.next() as u8;
            }
            bad.truncate(bad.len() - rng.below(3) as usize);
            let mut rest = &bad[..];
            let _ = read_all(&mut rest);
            let mut sealed = seal::start(bad.len());
            sealed.extend_from_slice(&bad);
            let _ = decode(&seal::seal(sealed, MAGIC));
            let mut flipped = bytes.clone();
            let at = rng.below(flipped.len() as u64) as usize;
            flipped[at] ^= 1 << rng.below(8);
            assert!(decode(&flipped).is_err());
        }
    }
    assert!(decode(&[]).is_err());
    for value in [0, 1, 127, 128, u64::MAX] {
        let mut out = Vec::new();
        put_number(&mut out, value);
        assert_eq!(get_number(&mut &out[..]), Some(value));
    }
    assert_eq!(get_number(&mut &[0xff; 11][..]), None);
}

/// A file that has a matching row is never skipped; one whose rows are all on one side is.
#[test]
fn pruning_skips_no_matching_file() {
    use std::cmp::Ordering;
    let schema = all_types();
    let mut rng = Rng::new(13);
    let pool = batch(&schema, 400, &mut rng);
    let mut skipped = 0;
    for _ in 0..400 {
        let rows = batch(&schema, 1 + rng.below(5) as usize, &mut rng);
        let stats = of(&schema, std::slice::from_ref(&rows));
        for (i, field) in schema.fields.iter().enumerate() {
            let constants: Vec<Scalar> = scalars(field.ty, pool.column(i))
                .into_iter()
                .flatten()
                .collect();
            let n = rows.num_rows() as i64;
            let values = scalars(field.ty, rows.column(i));
            let check = |predicate: &Predicate, matches: bool| {
                let may = may_match(Some(&stats[i]), n, field.ty, predicate);
                assert!(
                    may || !matches,
                    "{predicate:?} on {values:?} and {:?}",
                    stats[i]
                );
                assert!(may_match(None, n, field.ty, predicate));
                !may
            };
            let nulls = rows.column(i).null_count() as i64;
            assert_eq!(check(&Predicate::IsNull, nulls > 0), nulls == 0);
            assert_eq!(check(&Predicate::IsNotNull, nulls < n), nulls == n);
            if constants.is_empty() {
                continue;
            }
            for op in [
                CmpOp::Eq,
                CmpOp::Ne,
                CmpOp::Lt,
                CmpOp::Le,
                CmpOp::Gt,
                CmpOp::Ge,
            ] {
                let constant = constants[rng.below(constants.len() as u64) as usize].clone();
                let matches = values.iter().flatten().any(|value| {
                    let order = value.compare(&constant).unwrap();
                    match op {
                        CmpOp::Eq => order == Ordering::Equal,
                        CmpOp::Ne => order != Ordering::Equal,
                        CmpOp::Lt => order == Ordering::Less,
                        CmpOp::Le => order != Ordering::Greater,
                        CmpOp::Gt => order == Ordering::Greater,
                        CmpOp::Ge => order != Ordering::Less,
                    }
                });
                skipped += u32::from(check(&Predicate::Cmp(op, constant), matches));
            }
            let list: Vec<Scalar> = (0..rng.below(4))
                .map(|_| constants[rng.below(constants.len() as u64) as usize].clone())
                .collect();
            let matches = values
                .iter()
                .flatten()
                .any(|v| list.iter().any(|c| v.compare(c) == Some(Ordering::Equal)));
            skipped += u32::from(check(&Predicate::In(list), matches));
        }
    }
    assert!(skipped > 1000, "{skipped}");
}
