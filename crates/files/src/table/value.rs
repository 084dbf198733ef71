//! One column of a file as a column of the table: exact where the types agree, else by the coercions of events.

use std::fmt::Write;
use std::sync::Arc;

use arrow::array::types::{
    Date32Type, Float32Type, Float64Type, Int32Type, Int64Type, Time32MillisecondType,
    Time32SecondType, Time64MicrosecondType, Time64NanosecondType,
};
use arrow::array::{
    Array, ArrayRef, AsArray, Float64Array, GenericListArray, Int64Array, OffsetSizeTrait,
    StringArray, StringBuilder, TimestampMicrosecondArray, new_null_array,
};
use arrow::buffer::OffsetBuffer;
use arrow::compute::cast as arrow_cast;
use arrow::datatypes::{DataType, FieldRef, TimeUnit};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use rakam_event::coerce::{Value, coerce};
use rakam_event::json::{self, Cutter, Kind};
use rakam_event::time::MICROS_PER_DAY;
use rakam_event::types::FieldType;

use crate::{cast, cell};

/// What Postgres can hold, as days and microseconds since 1970: from 4713 BC.
const MIN_DAY: i32 = -2_440_588;
const MAX_DAY: i32 = 2_145_042_904;
const MIN_MICROS: i64 = MIN_DAY as i64 * MICROS_PER_DAY;

/// How the values of a column travel from the file to Postgres.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// As values of a field's type.
    Field(FieldType),
    /// As [`FieldType::Int4`].
    SmallInt,
    /// Microseconds since 1970, as [`FieldType::Timestamptz`].
    Timestamp,
    /// Microseconds since midnight, as [`FieldType::Int8`].
    Time,
    /// As the text that the type's input function reads.
    Literal,
}

impl Form {
    /// The type whose Arrow form the values have.
    pub fn carrier(self) -> FieldType {
        match self {
            Self::Field(ty) => ty,
            Self::SmallInt => FieldType::Int4,
            Self::Timestamp => FieldType::Timestamptz,
            Self::Time => FieldType::Int8,
            Self::Literal => FieldType::Text,
        }
    }
}

/// A column that is to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// As in the file.
    pub name: String,
    pub form: Form,
}

/// A value that is none of its column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfit {
    pub row: usize,
    pub reason: String,
}

impl Unfit {
    fn new(row: usize, reason: impl ToString) -> Self {
        Self {
            row,
            reason: reason.to_string(),
        }
    }
}

/// The column in [`Form::carrier`]'s Arrow form. `untyped`: cells of text without a type of their own, where an empty one
/// is no value of anything but text.
pub fn convert(array: &ArrayRef, form: Form, untyped: bool) -> Result<ArrayRef, Unfit> {
    if array.null_count() == array.len() || *array.data_type() == DataType::Null {
        return Ok(new_null_array(&form.carrier().arrow(), array.len()));
    }
    let array = cell::plain(array).map_err(|e| Unfit::new(0, e))?;
    match form {
        Form::Field(ty) => field(&array, ty, untyped),
        Form::Timestamp => field(&array, FieldType::Timestamptz, untyped),
        Form::SmallInt => {
            let values = field(&array, FieldType::Int4, untyped)?;
            let wide = values
                .as_primitive::<Int32Type>()
                .iter()
                .position(|v| v.is_some_and(|v| i16::try_from(v).is_err()));
            match wide {
                Some(row) => Err(Unfit::new(row, "number is out of range for type smallint")),
                None => Ok(values),
            }
        }
        Form::Time => time_of_day(&array),
        Form::Literal => literals(&array, untyped),
    }
}

fn field(array: &ArrayRef, ty: FieldType, untyped: bool) -> Result<ArrayRef, Unfit> {
    if let Some(exact) = exact(array, ty, untyped)? {
        return Ok(exact);
    }
    let cast = cast::cast(array, ty, untyped, usize::MAX).map_err(|e| Unfit::new(0, e))?;
    if let Some((row, error)) = cast.refused.first() {
        return Err(Unfit::new(*row, error));
    }
    match cast.notes.iter().find(|note| note.misfit) {
        Some(note) => Err(Unfit::new(note.row, &note.error)),
        None => Ok(cast.array),
    }
}

/// Types whose values are all values of the field, which a load treats with more care: what is not a number and times of
/// any year are kept. None: look at each value.
fn exact(array: &ArrayRef, ty: FieldType, untyped: bool) -> Result<Option<ArrayRef>, Unfit> {
    Ok(match (array.data_type(), ty) {
        (DataType::Float64, FieldType::Float8) => {
            let values = array.as_primitive::<Float64Type>();
            Some(Arc::new(values.unary::<_, Float64Type>(one_nan)))
        }
        (DataType::Float32, FieldType::Float4) => {
            let values = array.as_primitive::<Float32Type>();
            let one_nan = |value: f32| if value.is_nan() { f32::NAN } else { value };
            Some(Arc::new(values.unary::<_, Float32Type>(one_nan)))
        }
        (DataType::Float32, FieldType::Float8) => {
            let values = array.as_primitive::<Float32Type>();
            let wide = |value| one_nan(f64::from(value));
            Some(Arc::new(values.unary::<_, Float64Type>(wide)))
        }
        // As Postgres casts whole and decimal numbers: to the nearest.
        (
            DataType::Int64 | DataType::UInt64 | DataType::Decimal128(..),
            FieldType::Float4 | FieldType::Float8,
        ) => Some(arrow_cast(array, &ty.arrow()).map_err(|e| Unfit::new(0, e))?),
        (DataType::Utf8, FieldType::Float4 | FieldType::Float8) => {
            Some(floats(array.as_string(), ty, untyped)?)
        }
        (DataType::Date32, FieldType::Date) => {
            let days = array.as_primitive::<Date32Type>();
            match days
                .iter()
                .position(|d| d.is_some_and(|d| !(MIN_DAY..=MAX_DAY).contains(&d)))
            {
                Some(row) => return Err(Unfit::new(row, "date is out of range")),
                None => Some(Arc::clone(array)),
            }
        }
        (DataType::Date32, FieldType::Timestamptz) => {
            let days = array
                .as_primitive::<Date32Type>()
                .iter()
                .collect::<Vec<_>>();
            let micros = |row: usize| {
                let day: Option<i32> = days[row];
                day.map(|day| i64::from(day).checked_mul(MICROS_PER_DAY))
            };
            Some(timestamps(array.len(), micros)?)
        }
        (DataType::Timestamp(..), FieldType::Timestamptz) => {
            let micros = |row: usize| array.is_valid(row).then(|| cell::micros(array, row));
            Some(timestamps(array.len(), micros)?)
        }
        (DataType::Utf8, FieldType::Text) => {
            let texts = array.as_string::<i32>();
            without_nul(texts)?;
            Some(Arc::clone(array))
        }
        // A file of types says of its text that it is JSON.
        (DataType::Utf8, FieldType::Jsonb) if !untyped => {
            let texts = array.as_string::<i32>();
            match texts
                .iter()
                .position(|text| text.is_some_and(|text| !cast::is_json(text)))
            {
                Some(row) => return Err(Unfit::new(row, "text is not JSON")),
                None => Some(Arc::clone(array)),
            }
        }
        (
            DataType::List(item) | DataType::LargeList(item) | DataType::FixedSizeList(item, _),
            FieldType::BoolArray | FieldType::Float8Array | FieldType::TextArray,
        ) => {
            let same = match item.data_type() {
                DataType::Boolean => ty == FieldType::BoolArray,
                DataType::Float32 | DataType::Float64 => ty == FieldType::Float8Array,
                DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => {
                    ty == FieldType::TextArray
                }
                _ => false,
            };
            if !same {
                return Ok(None);
            }
            let lists = arrow_cast(&cut(array), &ty.arrow()).map_err(|e| Unfit::new(0, e))?;
            if let Some(texts) = lists.as_list::<i32>().values().as_string_opt::<i32>()
                && without_nul(texts).is_err()
            {
                // Which row it is in is seen value by value.
                return Ok(None);
            }
            Some(lists)
        }
        _ => None,
    })
}

/// Lists with the items of their own rows alone: a part of a column shares those of all of it, which a cast would write out.
fn cut(array: &ArrayRef) -> ArrayRef {
    fn of<O: OffsetSizeTrait>(list: &GenericListArray<O>, item: &FieldRef) -> ArrayRef {
        let offsets = list.offsets();
        let [first, last] =
            [offsets.first(), offsets.last()].map(|at| at.map_or(0, |at| at.as_usize()));
        let items = list.values().slice(first, last - first);
        let offsets = OffsetBuffer::<O>::from_lengths(offsets.lengths());
        let nulls = list.nulls().cloned();
        Arc::new(GenericListArray::new(
            Arc::clone(item),
            offsets,
            items,
            nulls,
        ))
    }
    match array.data_type() {
        DataType::List(item) => of(array.as_list::<i32>(), item),
        DataType::LargeList(item) => of(array.as_list::<i64>(), item),
        _ => Arc::clone(array),
    }
}

/// For Postgres all NaN are equal, and greater than any number; the engine compares bits, of which it knows one NaN only.
/// Others have a sign, as that of `0.0 / 0.0` on x86, or a message.
fn one_nan(value: f64) -> f64 {
    if value.is_nan() { f64::NAN } else { value }
}

/// Texts as numbers, to the nearest; also those that are none, and infinity.
fn floats(texts: &StringArray, ty: FieldType, untyped: bool) -> Result<ArrayRef, Unfit> {
    let values = texts
        .iter()
        .enumerate()
        .map(|(row, text)| match text {
            None => Ok(None),
            Some("") if untyped => Ok(None),
            Some(text) => float(text, ty)
                .map(Some)
                .map_err(|reason| Unfit::new(row, reason)),
        })
        .collect::<Result<Float64Array, Unfit>>()?;
    arrow_cast(&values, &ty.arrow()).map_err(|e| Unfit::new(0, e))
}

fn float(text: &str, ty: FieldType) -> Result<f64, String> {
    let value: f64 = text
        .trim()
        .parse()
        .map_err(|_| format!("text is not a value of type {ty}"))?;
    let value = one_nan(value);
    let narrow = match ty {
        FieldType::Float4 => f64::from(value as f32),
        _ => value,
    };
    // Infinity is said, not come to.
    let is_said = || text.contains(['n', 'N']);
    if narrow.is_infinite() && !is_said() {
        return Err(format!("number is out of range for type {ty}"));
    }
    Ok(narrow)
}

fn timestamps(
    rows: usize,
    micros: impl Fn(usize) -> Option<Option<i64>>,
) -> Result<ArrayRef, Unfit> {
    let values = (0..rows)
        .map(|row| match micros(row) {
            None => Ok(None),
            Some(Some(micros)) if micros >= MIN_MICROS => Ok(Some(micros)),
            Some(_) => Err(Unfit::new(row, "timestamp is out of range")),
        })
        .collect::<Result<TimestampMicrosecondArray, Unfit>>()?;
    Ok(Arc::new(
        values.with_data_type(FieldType::Timestamptz.arrow()),
    ))
}

fn without_nul(texts: &StringArray) -> Result<(), Unfit> {
    let (Some(&from), Some(&to)) = (texts.value_offsets().first(), texts.value_offsets().last())
    else {
        return Ok(());
    };
    if memchr::memchr(0, &texts.value_data()[from as usize..to as usize]).is_none() {
        return Ok(());
    }
    let row = texts
        .iter()
        .position(|text| text.is_some_and(|text| text.contains('\0')));
    // A NUL that is in no value is below a NULL.
    row.map_or(Ok(()), |row| Err(Unfit::new(row, NUL)))
}

const NUL: &str = "text holds a NUL character";

fn time_of_day(array: &ArrayRef) -> Result<ArrayRef, Unfit> {
    let micros: Int64Array = match array.data_type() {
        DataType::Time32(TimeUnit::Second) => array
            .as_primitive::<Time32SecondType>()
            .unary::<_, Int64Type>(|v| i64::from(v) * 1_000_000),
        DataType::Time32(_) => array
            .as_primitive::<Time32MillisecondType>()
            .unary::<_, Int64Type>(|v| i64::from(v) * 1_000),
        DataType::Time64(TimeUnit::Nanosecond) => array
            .as_primitive::<Time64NanosecondType>()
            .unary::<_, Int64Type>(|v| v.div_euclid(1_000)),
        DataType::Time64(_) => array
            .as_primitive::<Time64MicrosecondType>()
            .unary::<_, Int64Type>(|v| v),
        ty => {
            let row = (0..array.len()).find(|&row| array.is_valid(row));
            let reason = format!("{ty} is not a time of day");
            return Err(Unfit::new(row.unwrap_or(0), reason));
        }
    };
    match micros
        .iter()
        .position(|v| v.is_some_and(|v| !(0..=MICROS_PER_DAY).contains(&v)))
    {
        Some(row) => Err(Unfit::new(row, "time is out of range")),
        None => Ok(Arc::new(micros)),
    }
}

/// Each value as a text that the input function of its type reads.
fn literals(array: &ArrayRef, untyped: bool) -> Result<ArrayRef, Unfit> {
    let mut out = StringBuilder::with_capacity(array.len(), array.len() * 8);
    let mut text = String::new();
    for row in 0..array.len() {
        text.clear();
        if array.is_null(row) {
            out.append_null();
            continue;
        }
        write_literal(array, row, &mut text).map_err(|reason| Unfit::new(row, reason))?;
        if untyped && text.is_empty() {
            out.append_null();
        } else {
            out.append_value(&text);
        }
    }
    Ok(Arc::new(out.finish()))
}

fn write_literal(array: &ArrayRef, row: usize, out: &mut String) -> Result<(), String> {
    match array.data_type() {
        DataType::Utf8 => {
            let text = array.as_string::<i32>().value(row);
            if text.contains('\0') {
                return Err(NUL.to_owned());
            }
            out.push_str(text);
        }
        DataType::Binary => write_hex(array.as_binary::<i32>().value(row), out),
        DataType::FixedSizeBinary(_) => write_hex(array.as_fixed_size_binary().value(row), out),
        DataType::List(_) => write_array(&array.as_list::<i32>().value(row), out)?,
        DataType::LargeList(_) => write_array(&array.as_list::<i64>().value(row), out)?,
        DataType::FixedSizeList(..) => write_array(&array.as_fixed_size_list().value(row), out)?,
        DataType::Struct(_) | DataType::Map(..) | DataType::Decimal128(..) => {
            cell::write_json(array, row, out);
        }
        DataType::Boolean
        | DataType::Int64
        | DataType::UInt64
        | DataType::Float32
        | DataType::Float64
        | DataType::Date32
        | DataType::Timestamp(..) => {
            let mut raw = String::new();
            cell::write_json(array, row, &mut raw);
            match json::string(&raw) {
                Some(text) => out.push_str(&text),
                None => out.push_str(&raw),
            }
        }
        _ => {
            let options = FormatOptions::new();
            let shown = ArrayFormatter::try_new(array.as_ref(), &options)
                .and_then(|formatter| formatter.value(row).try_to_string())
                .map_err(|e| e.to_string())?;
            out.push_str(&shown);
        }
    }
    Ok(())
}

fn write_hex(bytes: &[u8], out: &mut String) {
    out.push_str("\\x");
    for byte in bytes {
        // Writing into a String cannot fail.
        let _ = write!(out, "{byte:02x}");
    }
}

/// `{"1",NULL,"say \"x\""}`: quotes do no harm to any element.
fn write_array(items: &ArrayRef, out: &mut String) -> Result<(), String> {
    let items = cell::plain(items).map_err(|e| e.to_string())?;
    let mut text = String::new();
    out.push('{');
    for row in 0..items.len() {
        if row > 0 {
            out.push(',');
        }
        if items.is_null(row) {
            out.push_str("NULL");
            continue;
        }
        text.clear();
        write_literal(&items, row, &mut text)?;
        out.push('"');
        for c in text.chars() {
            if matches!(c, '"' | '\\') {
                out.push('\\');
            }
            out.push(c);
        }
        out.push('"');
    }
    out.push('}');
    Ok(())
}

/// A raw JSON value as a value of the form; None for `null`.
pub fn of_json(raw: &str, form: Form) -> Result<Option<Value<'_>>, String> {
    if json::kind(raw) == Kind::Null {
        return Ok(None);
    }
    let mut cutter = Cutter::off();
    let ty = match form {
        Form::Literal => {
            let text = rakam_event::coerce::text(raw, &mut cutter);
            return Ok(text.map(Value::Text));
        }
        // As a time of day it would have to be read here: its text is not one of a file that has the type.
        Form::Time => return Err("text is not a time of day".to_owned()),
        form => form.carrier(),
    };
    let value = coerce(raw, ty, &mut cutter).or_else(|misfit| {
        // Numbers that an event would keep as they are; what JSON has no number for is written as text.
        let text = match json::kind(raw) {
            Kind::Number => raw.into(),
            Kind::String => json::string(raw).ok_or_else(|| misfit.to_string())?,
            _ => return Err(misfit.to_string()),
        };
        match ty {
            FieldType::Float8 => float(&text, ty).map(Value::Float8),
            FieldType::Float4 => float(&text, ty).map(|value| Value::Float4(value as f32)),
            _ => Err(misfit.to_string()),
        }
    })?;
    match (form, &value) {
        (Form::SmallInt, Value::Int4(n)) if i16::try_from(*n).is_err() => {
            Err("number is out of range for type smallint".to_owned())
        }
        _ => Ok(Some(value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{
        Date32Array, ListArray, ListBuilder, StringViewBuilder, TimestampNanosecondArray,
        UInt64Array,
    };

    fn shown(array: ArrayRef, form: Form) -> Result<Vec<String>, Unfit> {
        let array = convert(&array, form, false)?;
        let options = FormatOptions::new().with_null("NULL");
        let formatter = ArrayFormatter::try_new(array.as_ref(), &options).unwrap();
        Ok((0..array.len())
            .map(|row| formatter.value(row).to_string())
            .collect())
    }

    #[test]
    fn a_part_of_lists_has_their_items_alone() {
        let long = "x".repeat(100_000);
        let mut lists = ListBuilder::new(StringViewBuilder::new().with_deduplicate_strings());
        for row in 0..30_000 {
            lists.append_option((row % 5 > 0).then_some([Some(&long), None]));
        }
        let lists: ArrayRef = Arc::new(lists.finish());
        let form = Form::Field(FieldType::TextArray);
        let part = convert(&lists.slice(1_001, 5), form, false).unwrap();
        let part = part.as_list::<i32>();
        // Without the one that is NULL.
        assert_eq!(
            (part.len(), part.null_count(), part.values().len()),
            (5, 1, 8)
        );
        assert_eq!(part.value(0).as_string::<i32>().value(0), long);
        assert!(part.value(0).is_null(1));
    }

    #[test]
    fn what_fits_is_exact() {
        let floats: ArrayRef = Arc::new(Float64Array::from(vec![f64::NAN, -0.0, 1e300]));
        let kept = convert(&floats, Form::Field(FieldType::Float8), false).unwrap();
        let bits = |a: &ArrayRef| {
            let values = a.as_primitive::<arrow::datatypes::Float64Type>();
            values
                .values()
                .iter()
                .map(|v| v.to_bits())
                .collect::<Vec<_>>()
        };
        assert_eq!(bits(&kept), bits(&floats));
        let dates: ArrayRef = Arc::new(Date32Array::from(vec![Some(-1_000_000), None]));
        assert!(convert(&dates, Form::Field(FieldType::Date), false).is_ok());
        let dates: ArrayRef = Arc::new(Date32Array::from(vec![0, i32::MIN]));
        let error = convert(&dates, Form::Field(FieldType::Date), false).unwrap_err();
        assert_eq!(error.row, 1);
        // Numbers to the nearest, as Postgres casts them.
        let float8 = Form::Field(FieldType::Float8);
        let texts: ArrayRef = Arc::new(StringArray::from(vec![
            "9007199254740993",
            "0.5",
            "Infinity",
            "",
        ]));
        let found = convert(&texts, float8, true).unwrap();
        assert_eq!(
            found
                .as_primitive::<arrow::datatypes::Float64Type>()
                .iter()
                .collect::<Vec<_>>(),
            [
                Some(9007199254740992.0),
                Some(0.5),
                Some(f64::INFINITY),
                None
            ]
        );
        let huge: ArrayRef = Arc::new(StringArray::from(vec!["1", "1e999"]));
        assert_eq!(convert(&huge, float8, true).unwrap_err().row, 1);
        assert_eq!(
            of_json("9007199254740993", float8),
            Ok(Some(Value::Float8(9007199254740992.0)))
        );
        // Down to the microsecond, also before 1970.
        let times: ArrayRef = Arc::new(TimestampNanosecondArray::from(vec![1_500, -1]));
        let times = convert(&times, Form::Timestamp, false).unwrap();
        let micros = times.as_primitive::<arrow::datatypes::TimestampMicrosecondType>();
        assert_eq!(micros.values(), &[1, -1]);
    }

    #[test]
    fn all_nan_are_one() {
        let double = f64::from_bits(0xfff8_0000_0000_0000);
        let single = f32::from_bits(0xffc0_0001);
        let double: ArrayRef = Arc::new(Float64Array::from(vec![Some(double), None]));
        let single: ArrayRef = Arc::new(arrow::array::Float32Array::from(vec![Some(single), None]));
        let text: ArrayRef = Arc::new(StringArray::from(vec![Some("-nan"), None]));
        for array in [&double, &single, &text] {
            let form = Form::Field(FieldType::Float8);
            let kept = convert(array, form, false).unwrap();
            let kept = kept.as_primitive::<Float64Type>();
            assert_eq!(kept.value(0).to_bits(), f64::NAN.to_bits(), "{array:?}");
            assert!(kept.is_null(1));
        }
        for array in [&single, &text] {
            let form = Form::Field(FieldType::Float4);
            let kept = convert(array, form, false).unwrap();
            let kept = kept.as_primitive::<Float32Type>();
            assert_eq!(kept.value(0).to_bits(), f32::NAN.to_bits(), "{array:?}");
        }
        let Ok(Some(Value::Float8(value))) = of_json("\"-nan\"", Form::Field(FieldType::Float8))
        else {
            panic!("a NaN is a number");
        };
        assert_eq!(value.to_bits(), f64::NAN.to_bits());
    }

    #[test]
    fn days_as_milliseconds_are_dates() {
        let days = vec![Some(0), Some(-86_400_000), Some(19_860 * 86_400_000), None];
        let days: ArrayRef = Arc::new(arrow::array::Date64Array::from(days));
        let dates = ["1970-01-01", "1969-12-31", "2024-05-17", "NULL"].map(str::to_owned);
        assert_eq!(
            shown(Arc::clone(&days), Form::Field(FieldType::Date)),
            Ok(dates.to_vec())
        );
        let cast = cast::cast(&cell::plain(&days).unwrap(), FieldType::Date, false, 100).unwrap();
        assert_eq!((cast.array.null_count(), cast.notes.len()), (1, 0));
    }

    #[test]
    fn what_does_not_fit_is_told() {
        let numbers: ArrayRef = Arc::new(Int64Array::from(vec![1, 40_000]));
        let error = shown(Arc::clone(&numbers), Form::SmallInt).unwrap_err();
        assert_eq!((error.row, error.reason.contains("smallint")), (1, true));
        assert_eq!(
            shown(numbers, Form::Field(FieldType::Int4)),
            Ok(vec!["1".to_owned(), "40000".to_owned()])
        );
        let texts: ArrayRef = Arc::new(StringArray::from(vec!["a", "b\0"]));
        let error = shown(texts, Form::Field(FieldType::Text)).unwrap_err();
        assert_eq!((error.row, error.reason.as_str()), (1, NUL));
        let wide: ArrayRef = Arc::new(UInt64Array::from(vec![u64::MAX]));
        let numeric = FieldType::Numeric {
            precision: 20,
            scale: 0,
        };
        assert_eq!(
            shown(wide, Form::Field(numeric)),
            Ok(vec!["18446744073709551615".to_owned()])
        );
    }

    #[test]
    fn other_types_go_as_text() {
        let list: ArrayRef = Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>([
            Some(vec![Some(1), None]),
            None,
            Some(vec![]),
        ]));
        let array = ["{\"1\",NULL}", "NULL", "{}"].map(str::to_owned).to_vec();
        assert_eq!(shown(list, Form::Literal), Ok(array));
        let bytes: ArrayRef = Arc::new(arrow::array::BinaryArray::from_vec(vec![b"\x00\xff"]));
        assert_eq!(shown(bytes, Form::Literal), Ok(vec!["\\x00ff".to_owned()]));
        assert_eq!(
            of_json("\"NaN\"", Form::Field(FieldType::Float4))
                .map(|v| matches!(v, Some(Value::Float4(n)) if n.is_nan())),
            Ok(true)
        );
        assert_eq!(of_json("null", Form::Literal), Ok(None));
        assert!(of_json("\"x\"", Form::Field(FieldType::Int8)).is_err());
    }
}
