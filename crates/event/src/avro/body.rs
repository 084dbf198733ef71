//! Whether bytes are the body of a record: a walk over them before anything is decoded, so that a record that is none
//! is refused alone, and allocates nothing.

use super::schema::AvroField;
use crate::types::FieldType;
use crate::{json, net};

/// Days and microseconds since 1970 of the years 0001 to 9999.
const DAYS: std::ops::RangeInclusive<i32> = -719_162..=2_932_896;
const MICROS: std::ops::RangeInclusive<i64> =
    -719_162 * 86_400_000_000..=2_932_897 * 86_400_000_000 - 1;
/// JSON deeper than this is refused, as it is in collect.
const JSON_DEPTH: usize = 64;

type Check<T> = Result<T, &'static str>;

/// Checks that `body` is exactly one record of these fields, and that its values fit their types.
pub fn check(fields: &[AvroField], body: &[u8]) -> Check<()> {
    let mut cursor = Cursor(body);
    for field in fields {
        if cursor.is_present()? {
            value(&mut cursor, field.ty)?;
        }
    }
    if cursor.0.is_empty() {
        Ok(())
    } else {
        Err("bytes after its end")
    }
}

fn value(cursor: &mut Cursor<'_>, ty: FieldType) -> Check<()> {
    match ty {
        FieldType::Bool => cursor.boolean(),
        FieldType::Int4 => cursor.int().map(drop),
        FieldType::Int8 => cursor.long().map(drop),
        FieldType::Float4 => cursor.take(4).map(drop),
        FieldType::Float8 => cursor.take(8).map(drop),
        FieldType::Numeric { precision, .. } => decimal(cursor.bytes()?, precision),
        FieldType::Text => cursor.text().map(drop),
        FieldType::Inet => {
            let text = cursor.text()?;
            let canonical = net::canonical_inet(text);
            ensure(
                canonical.as_deref() == Some(text),
                "an inet value is malformed",
            )
        }
        FieldType::Jsonb => {
            let text = cursor.text()?;
            let sound = json::check(text, JSON_DEPTH).is_ok()
                && serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok();
            ensure(sound, "a jsonb value is malformed")
        }
        FieldType::Date => ensure(DAYS.contains(&cursor.int()?), "a date is out of range"),
        FieldType::Timestamptz => ensure(
            MICROS.contains(&cursor.long()?),
            "a timestamp is out of range",
        ),
        FieldType::Uuid => {
            let uuid = net::parse_uuid(cursor.text()?);
            ensure(uuid.is_some(), "a uuid is malformed")
        }
        FieldType::BoolArray => cursor.list(Cursor::boolean),
        FieldType::Float8Array => cursor.list(|c| c.take(8).map(drop)),
        FieldType::TextArray => cursor.list(|c| c.text().map(drop)),
    }
}

fn ensure(holds: bool, otherwise: &'static str) -> Check<()> {
    if holds { Ok(()) } else { Err(otherwise) }
}

/// A decimal's unscaled value: two's complement, most significant byte first.
fn decimal(bytes: &[u8], precision: u8) -> Check<()> {
    let Some(&first) = bytes.first() else {
        return Err("a numeric value has no bytes");
    };
    let mut value: i128 = if first >= 0x80 { -1 } else { 0 };
    ensure(bytes.len() <= 16, "a numeric value is out of range")?;
    for &byte in bytes {
        value = value << 8 | i128::from(byte);
    }
    let limit = 10u128.pow(u32::from(precision));
    ensure(
        value.unsigned_abs() < limit,
        "a numeric value is out of range",
    )
}

/// What is left of a body.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Check<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(n).ok_or("it ends too early")?;
        self.0 = rest;
        Ok(taken)
    }

    /// A zigzag number of at most ten bytes.
    fn long(&mut self) -> Check<i64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            let bits = u64::from(byte & 0x7F);
            ensure(shift < 63 || bits <= 1, "a number is too long")?;
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok((value >> 1) as i64 ^ -((value & 1) as i64));
            }
        }
        Err("a number is too long")
    }

    fn int(&mut self) -> Check<i32> {
        i32::try_from(self.long()?).map_err(|_| "an integer is out of range")
    }

    fn boolean(&mut self) -> Check<()> {
        ensure(self.take(1)?[0] <= 1, "a boolean is neither 0 nor 1")
    }

    /// The branch of a union of null and a type: whether there is a value.
    fn is_present(&mut self) -> Check<bool> {
        match self.long()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err("a union has no such branch"),
        }
    }

    fn bytes(&mut self) -> Check<&'a [u8]> {
        let n = usize::try_from(self.long()?).map_err(|_| "a length is negative")?;
        self.take(n)
    }

    fn text(&mut self) -> Check<&'a str> {
        let text = std::str::from_utf8(self.bytes()?).map_err(|_| "text is not valid UTF-8")?;
        ensure(!text.contains('\0'), "text contains a NUL character")?;
        Ok(text)
    }

    /// Blocks of nullable elements up to an empty block.
    fn list(&mut self, mut element: impl FnMut(&mut Self) -> Check<()>) -> Check<()> {
        loop {
            let count = self.long()?;
            let end = if count < 0 {
                let bytes = usize::try_from(self.long()?).map_err(|_| "a length is negative")?;
                let left = self.0.len().checked_sub(bytes).ok_or("it ends too early")?;
                Some(left)
            } else {
                None
            };
            if count == 0 {
                return Ok(());
            }
            // Every element takes a byte at least: a huge count ends with the bytes.
            for _ in 0..count.unsigned_abs() {
                if self.is_present()? {
                    element(self)?;
                }
            }
            ensure(
                end.is_none_or(|left| left == self.0.len()),
                "a block does not have its length",
            )?;
        }
    }
}
