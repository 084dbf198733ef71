//! Arrow columns → datums, column by column for a window of rows.
//!
//! Variable-length values are copied once, into blocks of a memory context that lives as long as the window.

use arrow::array::{
    Array, ArrayRef, AsArray, Decimal128Array, FixedSizeBinaryArray, Int64Array, RecordBatch,
    StringArray,
};
use arrow::datatypes::{
    Date32Type, Decimal128Type, Float32Type, Float64Type, Int32Type, Int64Type,
    TimestampMicrosecondType,
};
use pgrx::pg_sys;
use rakam_event::types::FieldType;

use super::values::PG_EPOCH_DAYS;
use crate::pg::{PG_EPOCH_US, PgError, Result};

/// Rows converted at a time: enough to amortise, few enough that wide rows stay small.
pub const WINDOW_ROWS: usize = 1024;

/// A column of the scan's output: where it goes in the tuple, where it comes from in the batch.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    /// Position in the tuple, from 0.
    pub attribute: usize,
    pub ty: FieldType,
    /// The values are texts for the input function of this type, with its modifier.
    pub input: Option<(pg_sys::Oid, i32)>,
}

/// Some rows of a batch as datums.
pub struct Window {
    columns: Vec<Datums>,
    /// What [`rakam_engine::rows::ROW_FIELD_ID`] says of each row, if it was asked for.
    ids: Option<Int64Array>,
    rows: usize,
    next: usize,
}

struct Datums {
    attribute: usize,
    /// None is NULL.
    values: Vec<Option<pg_sys::Datum>>,
}

impl Window {
    /// Converts up to [`WINDOW_ROWS`] rows from `offset` on. `outputs` are the batch's columns.
    ///
    /// The current memory context must live as long as the window; it holds by-reference values.
    pub fn convert(
        batch: &RecordBatch,
        offset: usize,
        outputs: &[Output],
        ids: Option<&Int64Array>,
    ) -> Result<Self> {
        let rows = (batch.num_rows() - offset).min(WINDOW_ROWS);
        let columns = outputs
            .iter()
            .zip(batch.columns())
            .map(|(output, column)| {
                Ok(Datums {
                    attribute: output.attribute,
                    values: output.datums(&column.slice(offset, rows))?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            columns,
            ids: ids.map(|ids| ids.slice(offset, rows)),
            rows,
            next: 0,
        })
    }

    /// The identity of the row filled in last.
    pub fn row(&self) -> Option<i64> {
        let ids = self.ids.as_ref()?;
        self.next.checked_sub(1).map(|last| ids.value(last))
    }

    /// Puts the next row's values into the arrays of a tuple; false when there is none.
    ///
    /// # Safety
    /// Both arrays have an entry for every attribute of the outputs; all NULL flags are set before.
    pub unsafe fn fill(&mut self, values: *mut pg_sys::Datum, nulls: *mut bool) -> bool {
        if self.next == self.rows {
            return false;
        }
        for column in &self.columns {
            if let Some(datum) = column.values[self.next] {
                // SAFETY: as promised by the caller.
                unsafe {
                    *values.add(column.attribute) = datum;
                    *nulls.add(column.attribute) = false;
                }
            }
        }
        self.next += 1;
        true
    }
}

impl Output {
    fn datums(&self, column: &ArrayRef) -> Result<Column> {
        match (self.input, column.as_string_opt::<i32>()) {
            (Some((type_oid, typmod)), Some(texts)) => Ok(parsed(texts, type_oid, typmod)),
            _ => datums(column, self.ty),
        }
    }
}

type Column = Vec<Option<pg_sys::Datum>>;

fn datums(column: &ArrayRef, ty: FieldType) -> Result<Column> {
    use FieldType as F;
    let converted = match ty {
        F::Bool => column
            .as_boolean_opt()
            .map(|a| a.iter().map(|v| v.map(pg_sys::Datum::from)).collect()),
        F::Int4 => column
            .as_primitive_opt::<Int32Type>()
            .map(|a| a.iter().map(|v| v.map(pg_sys::Datum::from)).collect()),
        F::Int8 => column
            .as_primitive_opt::<Int64Type>()
            .map(|a| a.iter().map(|v| v.map(pg_sys::Datum::from)).collect()),
        F::Float4 => column.as_primitive_opt::<Float32Type>().map(|a| {
            a.iter()
                .map(|v| v.map(|v| pg_sys::Datum::from(v.to_bits())))
                .collect()
        }),
        F::Float8 => column.as_primitive_opt::<Float64Type>().map(|a| {
            a.iter()
                .map(|v| v.map(|v| pg_sys::Datum::from(v.to_bits())))
                .collect()
        }),
        F::Numeric { scale, .. } => column
            .as_primitive_opt::<Decimal128Type>()
            .map(|a| numerics(a, scale)),
        F::Text => column.as_string_opt::<i32>().map(texts),
        F::Date => column.as_primitive_opt::<Date32Type>().map(|a| {
            a.iter()
                .map(|v| v.map(|days| pg_sys::Datum::from(days - PG_EPOCH_DAYS)))
                .collect()
        }),
        F::Timestamptz => column
            .as_primitive_opt::<TimestampMicrosecondType>()
            .map(|a| {
                a.iter()
                    .map(|v| v.map(|micros| pg_sys::Datum::from(micros - PG_EPOCH_US)))
                    .collect()
            }),
        F::Uuid => column.as_fixed_size_binary_opt().and_then(uuids),
        F::Inet => column
            .as_string_opt::<i32>()
            .map(|a| parsed(a, pg_sys::INETOID, -1)),
        F::Jsonb => column
            .as_string_opt::<i32>()
            .map(|a| parsed(a, pg_sys::JSONBOID, -1)),
        F::BoolArray | F::Float8Array | F::TextArray => arrays(column, ty),
    };
    converted.ok_or_else(|| {
        PgError::internal(format!(
            "the engine gave {} for a column of type {ty}",
            column.data_type()
        ))
    })
}

/// Bump allocation in the current memory context, eight-byte aligned.
struct Arena {
    block: *mut u8,
    left: usize,
}

const BLOCK_BYTES: usize = 64 << 10;

impl Arena {
    fn new() -> Self {
        Self {
            block: std::ptr::null_mut(),
            left: 0,
        }
    }

    fn allocate(&mut self, bytes: usize) -> *mut u8 {
        let bytes = bytes.next_multiple_of(8);
        // SAFETY: palloc'd memory of the size asked for; pointers stay within the block.
        unsafe {
            if bytes > BLOCK_BYTES / 4 {
                return pg_sys::palloc(bytes).cast();
            }
            if self.left < bytes {
                self.block = pg_sys::palloc(BLOCK_BYTES).cast();
                self.left = BLOCK_BYTES;
            }
            let here = self.block;
            self.block = here.add(bytes);
            self.left -= bytes;
            here
        }
    }

    /// A text datum: four bytes of length, then the bytes.
    fn text(&mut self, value: &str) -> pg_sys::Datum {
        let total = value.len() + pg_sys::VARHDRSZ;
        let here = self.allocate(total);
        // SAFETY: `total` bytes were allocated; a value of Arrow is below 2 GB, one of ours below 1 GB.
        unsafe {
            pgrx::varlena::set_varsize_4b(here.cast(), total as i32);
            std::ptr::copy_nonoverlapping(value.as_ptr(), here.add(pg_sys::VARHDRSZ), value.len());
        }
        pg_sys::Datum::from(here)
    }
}

fn texts(column: &StringArray) -> Column {
    let mut arena = Arena::new();
    column
        .iter()
        .map(|v| v.map(|text| arena.text(text)))
        .collect()
}

fn uuids(column: &FixedSizeBinaryArray) -> Option<Column> {
    if column.value_length() != 16 {
        return None;
    }
    let mut arena = Arena::new();
    Some(
        column
            .iter()
            .map(|v| {
                v.map(|bytes| {
                    let here = arena.allocate(16);
                    // SAFETY: 16 bytes were allocated, and every value has 16.
                    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), here, 16) };
                    pg_sys::Datum::from(here)
                })
            })
            .collect(),
    )
}

/// The input function of a type, looked up once per column of a window.
struct Input {
    function: pg_sys::FmgrInfo,
    io_param: pg_sys::Oid,
    typmod: i32,
    buffer: Vec<u8>,
}

impl Input {
    fn new(type_oid: pg_sys::Oid, typmod: i32) -> Self {
        let (mut oid, mut io_param) = (pg_sys::InvalidOid, pg_sys::InvalidOid);
        let mut function = pg_sys::FmgrInfo::default();
        // SAFETY: catalog look-ups; what they allocate lives as long as the window.
        unsafe {
            pg_sys::getTypeInputInfo(type_oid, &mut oid, &mut io_param);
            pg_sys::fmgr_info(oid, &mut function);
        }
        Self {
            function,
            io_param,
            typmod,
            buffer: Vec::new(),
        }
    }

    /// The datum of a text form; one that is not valid raises an error.
    fn parse(&mut self, text: &str) -> pg_sys::Datum {
        self.buffer.clear();
        self.buffer.extend_from_slice(text.as_bytes());
        self.buffer.push(0);
        // SAFETY: the text is NUL-terminated and read before the call returns.
        unsafe {
            pg_sys::InputFunctionCall(
                &mut self.function,
                self.buffer.as_mut_ptr().cast(),
                self.io_param,
                self.typmod,
            )
        }
    }
}

fn parsed(column: &StringArray, type_oid: pg_sys::Oid, typmod: i32) -> Column {
    let mut input = Input::new(type_oid, typmod);
    column
        .iter()
        .map(|v| v.map(|text| input.parse(text)))
        .collect()
}

fn numerics(column: &Decimal128Array, scale: u8) -> Column {
    let mut input: Option<Input> = None;
    column
        .iter()
        .map(|v| {
            v.map(|unscaled| match i64::try_from(unscaled) {
                // SAFETY: allocates a numeric of exactly this value and scale.
                Ok(unscaled) => pg_sys::Datum::from(unsafe {
                    pg_sys::int64_div_fast_to_numeric(unscaled, i32::from(scale))
                }),
                Err(_) => input
                    .get_or_insert_with(|| Input::new(pg_sys::NUMERICOID, -1))
                    .parse(&decimal_text(unscaled, scale)),
            })
        })
        .collect()
}

/// `unscaled` × 10^−`scale` in plain notation.
fn decimal_text(unscaled: i128, scale: u8) -> String {
    let digits = unscaled.unsigned_abs().to_string();
    let scale = usize::from(scale);
    let digits = format!("{digits:0>width$}", width = scale + 1);
    let (whole, fraction) = digits.split_at(digits.len() - scale);
    let sign = if unscaled < 0 { "-" } else { "" };
    match scale {
        0 => format!("{sign}{whole}"),
        _ => format!("{sign}{whole}.{fraction}"),
    }
}

fn arrays(column: &ArrayRef, ty: FieldType) -> Option<Column> {
    let lists = column.as_list_opt::<i32>()?;
    let (element, len, by_value, align) = match ty {
        FieldType::BoolArray => (pg_sys::BOOLOID, 1, true, b'c'),
        FieldType::Float8Array => (pg_sys::FLOAT8OID, 8, true, b'd'),
        _ => (pg_sys::TEXTOID, -1, false, b'i'),
    };
    let element_type = match ty {
        FieldType::BoolArray => FieldType::Bool,
        FieldType::Float8Array => FieldType::Float8,
        _ => FieldType::Text,
    };
    let mut out = Vec::with_capacity(lists.len());
    for list in lists.iter() {
        let Some(list) = list else {
            out.push(None);
            continue;
        };
        let items = datums(&list, element_type).ok()?;
        let mut nulls: Vec<bool> = items.iter().map(Option::is_none).collect();
        let mut values: Vec<pg_sys::Datum> = items
            .into_iter()
            .map(|item| item.unwrap_or(pg_sys::Datum::from(0usize)))
            .collect();
        let (mut dims, mut lower) = (values.len() as i32, 1);
        // SAFETY: values and flags have one entry per element; the array is a copy of them.
        let array = unsafe {
            if values.is_empty() {
                pg_sys::construct_empty_array(element)
            } else {
                pg_sys::construct_md_array(
                    values.as_mut_ptr(),
                    nulls.as_mut_ptr(),
                    1,
                    &mut dims,
                    &mut lower,
                    element,
                    len,
                    by_value,
                    align as std::ffi::c_char,
                )
            }
        };
        out.push(Some(pg_sys::Datum::from(array)));
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimals_print_with_their_scale() {
        for (unscaled, scale, text) in [
            (0, 0, "0"),
            (0, 2, "0.00"),
            (5, 2, "0.05"),
            (-5, 2, "-0.05"),
            (12345, 2, "123.45"),
            (i128::from(i64::MAX) + 1, 0, "9223372036854775808"),
            (
                -(10_i128.pow(38) - 1),
                38,
                "-0.99999999999999999999999999999999999999",
            ),
        ] {
            assert_eq!(decimal_text(unscaled, scale), text);
        }
    }
}
