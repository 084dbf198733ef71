//! Seeded rows of every type for the tests of this crate, and as a beginning for the fuzz targets.

use std::sync::Arc;

use arrow::array::{
    ArrayRef, AsArray, BooleanArray, BooleanBuilder, Date32Array, Decimal128Array,
    FixedSizeBinaryBuilder, Float32Array, Float64Array, Float64Builder, Int32Array, Int64Array,
    ListBuilder, RecordBatch, StringArray, StringBuilder, TimestampMicrosecondArray,
};
use arrow::datatypes::{DataType, Field as ArrowField};
use rakam_event::schema::{FIRST_USER_FIELD_ID, Field, Schema, XID_FIELD_ID};
use rakam_event::types::FieldType;
use uuid::Uuid;

use crate::period::{MICROS_PER_DAY, Period};
use crate::sort;
use crate::write::{FileOptions, FileWriter, WrittenFile};

/// SplitMix64: the same rows for the same seed, for ever.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    // Endless and of one type: nothing is gained by an iterator.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// Both ends inclusive.
    pub fn between(&mut self, low: i64, high: i64) -> i64 {
        low + self.below((high - low + 1) as u64) as i64
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

/// A schema with a field of each type (and three of numeric, by physical type).
pub fn all_types() -> Schema {
    let numeric = |precision, scale| FieldType::Numeric { precision, scale };
    let types = [
        FieldType::Bool,
        FieldType::Int4,
        FieldType::Int8,
        FieldType::Float4,
        FieldType::Float8,
        numeric(9, 2),
        numeric(18, 0),
        numeric(38, 10),
        FieldType::Text,
        FieldType::Date,
        FieldType::Timestamptz,
        FieldType::Uuid,
        FieldType::Inet,
        FieldType::Jsonb,
        FieldType::BoolArray,
        FieldType::Float8Array,
        FieldType::TextArray,
    ];
    let fields = types.into_iter().enumerate().map(|(i, ty)| Field {
        id: FIRST_USER_FIELD_ID + i as i32,
        name: format!("f.{i} {ty}"),
        ty,
        added_version: 1,
        column_ready: true,
    });
    Schema::new(1, fields.collect())
}

pub fn file_options() -> FileOptions {
    FileOptions {
        project: "acme".into(),
        project_id: 3,
        collection: "pageview".into(),
        collection_id: 7,
        flush_id: Uuid::nil(),
        period: Period::Month,
        first_day: 19_844,
        replaces: None,
    }
}

/// A data file of `n` random rows of every type.
pub fn file(n: usize, seed: u64) -> WrittenFile<Vec<u8>> {
    let schema = all_types();
    let rows = sort::by_time(&batch(&schema, n, &mut Rng::new(seed))).expect("sorted rows");
    let options = file_options();
    let mut writer = FileWriter::new(&schema, &options, Vec::new());
    writer.write(&rows).expect("rows of the schema");
    writer.finish().expect("a file")
}

/// Random rows with NULLs and extremes; times within two years, `_xid` counting up.
pub fn batch(schema: &Schema, n: usize, rng: &mut Rng) -> RecordBatch {
    let mut columns: Vec<ArrayRef> = schema
        .fields
        .iter()
        .map(|field| match field.id {
            1 | 9 => {
                let start = 19_700 * MICROS_PER_DAY;
                let span = 700 * MICROS_PER_DAY;
                let times =
                    (0..n).map(|_| rng.between(start, start + span) / 60_000_000 * 60_000_000);
                Arc::new(TimestampMicrosecondArray::from_iter_values(times).with_timezone("UTC"))
                    as ArrayRef
            }
            _ => typed(&column(field.ty, n, rng), &field.arrow()),
        })
        .collect();
    let first = rng.between(1000, 2000);
    let mut clock = first;
    columns.push(Arc::new(
        (0..n)
            .map(|_| {
                clock += 1;
                clock + ((XID_FIELD_ID as i64) << 20) * first
            })
            .collect::<Int64Array>(),
    ));
    RecordBatch::try_new(schema.arrow(), columns).expect("columns of the schema")
}

fn text(rng: &mut Rng) -> String {
    let alphabet = [
        'a',
        'b',
        'z',
        '0',
        'ä',
        '€',
        '😀',
        '\u{10ffff}',
        '\u{d7ff}',
        ' ',
        '\u{0}',
    ];
    let long = rng.below(8) == 0;
    let length = if long {
        rng.between(60, 90)
    } else {
        rng.between(0, 6)
    };
    (0..length).map(|_| rng.pick(&alphabet)).collect()
}

/// A column in which some values are NULL, now and then all or none.
pub fn column(ty: FieldType, n: usize, rng: &mut Rng) -> ArrayRef {
    let nulls = rng.pick(&[0, 1, 5, 10]);
    let some = |rng: &mut Rng| rng.below(10) >= nulls;
    macro_rules! primitive {
        ($array:ty, $rng:ident => $value:expr) => {
            (0..n)
                .map(|_| {
                    some(rng).then(|| {
                        let $rng = &mut *rng;
                        $value
                    })
                })
                .collect::<$array>()
        };
    }
    const FLOATS: [f64; 8] = [
        0.0,
        -0.0,
        1.5,
        -1e300,
        f64::MAX,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::MIN_POSITIVE,
    ];
    match ty {
        FieldType::Bool => Arc::new(primitive!(BooleanArray, r => r.below(2) == 0)),
        FieldType::Int4 => Arc::new(primitive!(Int32Array, r => r.pick(&[0, 1, -1, 7, i32::MIN, i32::MAX]))),
        FieldType::Int8 => Arc::new(primitive!(Int64Array, r => r.pick(&[0, 1, -1, 7, i64::MIN, i64::MAX]))),
        FieldType::Float4 => Arc::new(primitive!(Float32Array, r => r.pick(&FLOATS) as f32)),
        FieldType::Float8 => Arc::new(primitive!(Float64Array, r => r.pick(&FLOATS))),
        FieldType::Numeric { precision, scale } => {
            let top = 10i128.pow(u32::from(precision)) - 1;
            Arc::new(
                primitive!(Decimal128Array, r => r.pick(&[0, 1, -1, 127, 128, -128, -129, top, -top]))
                    .with_precision_and_scale(precision, scale as i8)
                    .expect("a precision of numeric"),
            )
        }
        FieldType::Text => Arc::new(primitive!(StringArray, r => text(r))),
        FieldType::Inet => Arc::new(primitive!(StringArray, r => format!("10.0.0.{}", r.below(256)))),
        FieldType::Jsonb => Arc::new(primitive!(StringArray, r => format!("{{\"a\": {}}}", r.below(9)))),
        FieldType::Date => Arc::new(primitive!(Date32Array, r => r.between(-719_162, 2_932_896) as i32)),
        FieldType::Timestamptz => Arc::new(
            primitive!(TimestampMicrosecondArray, r => r.between(-62_135_596_800_000_000, 253_402_300_799_999_999))
                .with_timezone("UTC"),
        ),
        FieldType::Uuid => {
            let mut builder = FixedSizeBinaryBuilder::new(16);
            for _ in 0..n {
                if some(rng) {
                    let high = rng.pick(&[0, u64::MAX, 1 << 40]);
                    let value = (u128::from(high) << 64) | u128::from(rng.next());
                    builder.append_value(value.to_be_bytes()).expect("16 bytes");
                } else {
                    builder.append_null();
                }
            }
            Arc::new(builder.finish())
        }
        FieldType::BoolArray | FieldType::Float8Array | FieldType::TextArray => list(ty, n, rng, some),
    }
}

fn list(ty: FieldType, n: usize, rng: &mut Rng, some: impl Fn(&mut Rng) -> bool) -> ArrayRef {
    macro_rules! fill {
        ($builder:expr, $r:ident => $value:expr) => {{
            let mut builder = ListBuilder::new($builder);
            for _ in 0..n {
                for _ in 0..rng.below(4) {
                    let value = some(rng).then(|| {
                        let $r = &mut *rng;
                        $value
                    });
                    builder.values().append_option(value);
                }
                builder.append(some(rng));
            }
            builder.finish()
        }};
    }
    let array = match ty {
        FieldType::BoolArray => fill!(BooleanBuilder::new(), r => r.below(2) == 0),
        FieldType::Float8Array => fill!(Float64Builder::new(), r => r.pick(&[0.5, f64::INFINITY])),
        _ => fill!(StringBuilder::new(), r => text(r)),
    };
    let (_, offsets, values, nulls) = array.into_parts();
    let DataType::List(item) = ty.arrow() else {
        unreachable!("a list type");
    };
    Arc::new(arrow::array::ListArray::new(item, offsets, values, nulls))
}

/// The array under the schema's own field, so that a list's element has its id.
fn typed(array: &ArrayRef, field: &ArrowField) -> ArrayRef {
    match (array.data_type(), field.data_type()) {
        (DataType::List(_), DataType::List(item)) => {
            let (_, offsets, values, nulls) = array.as_list::<i32>().clone().into_parts();
            Arc::new(arrow::array::ListArray::new(
                Arc::clone(item),
                offsets,
                values,
                nulls,
            ))
        }
        _ => Arc::clone(array),
    }
}
