//! JSON as text: an event is a walk over its keys and raw values, never a tree of values.
//!
//! serde_json parses; what it leaves open is checked here by one scan before any parsing: nesting, NUL and
//! half surrogates in escapes, numbers that Postgres' jsonb cannot hold. A *raw* value below is the text of one
//! valid JSON value without outer blanks. Numbers keep their text.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserializer as _, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::error::EventError;
use crate::number::Number;

/// JSON deeper than this is refused; an event's own object is level 1.
pub const MAX_DEPTH: usize = 64;
/// A number without exponent is surely in the range of numeric up to this many bytes.
pub(crate) const SHORT_NUMBER: usize = 16_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Null,
    Bool,
    Number,
    String,
    Array,
    Object,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Null => "null",
            Self::Bool => "a boolean",
            Self::Number => "a number",
            Self::String => "a string",
            Self::Array => "an array",
            Self::Object => "an object",
        })
    }
}

/// The kind of a raw value, by its first byte.
pub fn kind(raw: &str) -> Kind {
    match raw.as_bytes().first() {
        Some(b'{') => Kind::Object,
        Some(b'[') => Kind::Array,
        Some(b'"') => Kind::String,
        Some(b't' | b'f') => Kind::Bool,
        Some(b'n') | None => Kind::Null,
        Some(_) => Kind::Number,
    }
}

/// Checks what the parser does not: call it before anything else looks at the text. Says nothing about syntax.
pub fn check(text: &str, max_depth: usize) -> Result<(), EventError> {
    let bytes = text.as_bytes();
    let mut depth = 0_usize;
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        match byte {
            b'"' => at = check_string(bytes, at + 1)?,
            b'-' | b'0'..=b'9' => at = check_number(text, at)?,
            b'{' | b'[' => {
                depth += 1;
                if depth > max_depth {
                    return Err(EventError::TooDeep { limit: MAX_DEPTH });
                }
                at += 1;
            }
            b'}' | b']' => {
                depth = depth.saturating_sub(1);
                at += 1;
            }
            _ => at += 1,
        }
    }
    Ok(())
}

/// Checks the escapes of a string whose content starts at `at`; answers where it ends.
fn check_string(bytes: &[u8], mut at: usize) -> Result<usize, EventError> {
    let half = || EventError::InvalidJson("Unicode surrogates must come in pairs".to_owned());
    loop {
        let Some(next) = bytes
            .get(at..)
            .and_then(|rest| rest.iter().position(|&b| b == b'"' || b == b'\\'))
        else {
            return Ok(bytes.len());
        };
        at += next;
        if bytes[at] == b'"' {
            return Ok(at + 1);
        }
        match escaped_unit(bytes, at) {
            Some(0) => return Err(EventError::NulCharacter),
            Some(0xD800..=0xDBFF) => match escaped_unit(bytes, at + 6) {
                Some(0xDC00..=0xDFFF) => at += 12,
                _ => return Err(half()),
            },
            Some(0xDC00..=0xDFFF) => return Err(half()),
            Some(_) => at += 6,
            None => at += 2,
        }
    }
}

/// The UTF-16 unit of an escape `\uXXXX` at `at`.
pub(crate) fn escaped_unit(bytes: &[u8], at: usize) -> Option<u16> {
    let digits = match bytes.get(at..at + 6)? {
        [b'\\', b'u', digits @ ..] => digits,
        _ => return None,
    };
    digits.iter().try_fold(0, |unit: u16, &b| {
        let digit = char::from(b).to_digit(16)?;
        Some(unit << 4 | digit as u16)
    })
}

fn check_number(text: &str, start: usize) -> Result<usize, EventError> {
    let bytes = &text.as_bytes()[start..];
    let mut exponent = false;
    let mut len = 0;
    while let Some(&byte) = bytes.get(len) {
        match byte {
            b'0'..=b'9' | b'-' | b'+' | b'.' => {}
            b'e' | b'E' => exponent = true,
            _ => break,
        }
        len += 1;
    }
    // All bytes taken are ASCII, so the slice is on character boundaries.
    if (exponent || len > SHORT_NUMBER)
        && Number::parse(&text[start..start + len]).is_some_and(|n| !n.fits_numeric())
    {
        return Err(EventError::NumberOutOfRange);
    }
    Ok(start + len)
}

/// Calls `f` with each key and raw value of an object, in order, duplicates included.
pub fn object_entries<'a>(text: &'a str, f: impl FnMut(&str, &'a str)) -> Result<(), EventError> {
    let text = trim(text);
    if kind(text) != Kind::Object {
        return Err(wrong_kind(text, EventError::NotAnObject));
    }
    let mut parser = serde_json::Deserializer::from_str(text);
    parser
        .deserialize_map(Entries(f))
        .and_then(|()| parser.end())
        .map_err(invalid)
}

/// Calls `f` with each raw value of an array, in order.
pub fn array_elements<'a>(text: &'a str, f: impl FnMut(&'a str)) -> Result<(), EventError> {
    let text = trim(text);
    if kind(text) != Kind::Array {
        return Err(wrong_kind(text, EventError::NotAnArray));
    }
    let mut parser = serde_json::Deserializer::from_str(text);
    parser
        .deserialize_seq(Elements(f))
        .and_then(|()| parser.end())
        .map_err(invalid)
}

/// The text of a raw string.
pub fn string(raw: &str) -> Option<Cow<'_, str>> {
    let inner = raw.strip_prefix('"')?.strip_suffix('"')?;
    if inner.contains('\\') {
        serde_json::from_str(raw).ok().map(Cow::Owned)
    } else {
        Some(Cow::Borrowed(inner))
    }
}

/// Without the blanks of JSON around it.
pub fn trim(text: &str) -> &str {
    text.trim_matches([' ', '\t', '\n', '\r'])
}

fn wrong_kind(text: &str, error: fn(Kind) -> EventError) -> EventError {
    match serde_json::from_str::<&RawValue>(text) {
        Ok(_) => error(kind(text)),
        Err(e) => invalid(e),
    }
}

fn invalid(error: serde_json::Error) -> EventError {
    EventError::InvalidJson(error.to_string())
}

struct Entries<F>(F);

impl<'de, F: FnMut(&str, &'de str)> Visitor<'de> for Entries<F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        while let Some(Key(key)) = map.next_key()? {
            let value: &'de RawValue = map.next_value()?;
            (self.0)(&key, value.get());
        }
        Ok(())
    }
}

/// A key, borrowed unless it has escapes (serde's own `Cow` always copies).
struct Key<'a>(Cow<'a, str>);

impl<'de> serde::Deserialize<'de> for Key<'de> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeyVisitor;
        impl<'de> Visitor<'de> for KeyVisitor {
            type Value = Key<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }

            fn visit_borrowed_str<E>(self, key: &'de str) -> Result<Key<'de>, E> {
                Ok(Key(Cow::Borrowed(key)))
            }

            fn visit_str<E>(self, key: &str) -> Result<Key<'de>, E> {
                Ok(Key(Cow::Owned(key.to_owned())))
            }
        }
        deserializer.deserialize_str(KeyVisitor)
    }
}

struct Elements<F>(F);

impl<'de, F: FnMut(&'de str)> Visitor<'de> for Elements<F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut array: A) -> Result<(), A::Error> {
        while let Some(value) = array.next_element::<&'de RawValue>()? {
            (self.0)(value.get());
        }
        Ok(())
    }
}

/// Writes text as a JSON string, with the escapes that Postgres writes.
pub fn write_string(text: &str, out: &mut String) {
    out.push('"');
    let mut rest = text;
    loop {
        let (plain, special) = rest.split_at(plain_len(rest.as_bytes()));
        out.push_str(plain);
        let Some(&byte) = special.as_bytes().first() else {
            break;
        };
        let (escape, len) = escape(byte);
        out.extend(escape.iter().take(len).copied().map(char::from));
        rest = &special[1..];
    }
    out.push('"');
}

/// [`write_string`] of bytes that are, or will be checked to be, UTF-8.
pub(crate) fn write_bytes(text: &[u8], out: &mut Vec<u8>) {
    out.push(b'"');
    let mut rest = text;
    loop {
        let (plain, special) = rest.split_at(plain_len(rest));
        out.extend_from_slice(plain);
        let Some((&byte, after)) = special.split_first() else {
            break;
        };
        let (escape, len) = escape(byte);
        out.extend(escape.iter().take(len));
        rest = after;
    }
    out.push(b'"');
}

/// How a quote, backslash or control character is written: so many of these bytes.
fn escape(byte: u8) -> ([u8; 6], usize) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let short = match byte {
        b'\n' => b'n',
        b'\r' => b'r',
        b'\t' => b't',
        0x08 => b'b',
        0x0c => b'f',
        0x00..=0x1f => {
            let (high, low) = (HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]);
            return ([b'\\', b'u', b'0', b'0', high, low], 6);
        }
        other => other,
    };
    ([b'\\', short, 0, 0, 0, 0], 2)
}

/// How many bytes at the start of a text are neither quote, backslash nor control character.
#[inline(always)]
pub(crate) fn plain_len(bytes: &[u8]) -> usize {
    let mut len = 0;
    while let Some(word) = bytes.get(len..).and_then(|rest| rest.first_chunk::<8>()) {
        let found = special_bytes(u64::from_le_bytes(*word));
        if found != 0 {
            return len + found.trailing_zeros() as usize / 8;
        }
        len += 8;
    }
    while let Some(byte) = bytes.get(len)
        && !matches!(byte, 0..=0x1f | b'"' | b'\\')
    {
        len += 1;
    }
    len
}

/// Of eight bytes, the lowest first: the top bit of each that is a quote, a backslash or a control character is
/// set. Bits above the lowest set one may be wrong (a borrow runs upwards).
#[inline(always)]
fn special_bytes(word: u64) -> u64 {
    const ONES: u64 = u64::MAX / 255;
    let below = |word: u64, limit: u8| word.wrapping_sub(ONES * u64::from(limit)) & !word;
    let equal = |byte: u8| below(word ^ (ONES * u64::from(byte)), 1);
    (equal(b'"') | equal(b'\\') | below(word, b' ')) & (ONES << 7)
}

/// Cuts strings that are too long, and remembers that it did.
#[derive(Debug, Clone, Copy)]
pub struct Cutter {
    max_bytes: usize,
    /// The size of the first string that was cut.
    pub cut_from: Option<usize>,
}

impl Cutter {
    pub fn new(max_bytes: usize) -> Self {
        Self {
            max_bytes,
            cut_from: None,
        }
    }

    /// Leaves strings as they are, as for values that were stored before.
    pub fn off() -> Self {
        Self::new(usize::MAX)
    }

    pub fn max_bytes(&self) -> usize {
        self.max_bytes
    }

    /// The longest start of the text that is within the limit and ends on a character boundary.
    pub fn cut<'a>(&mut self, text: Cow<'a, str>) -> Cow<'a, str> {
        if text.len() <= self.max_bytes {
            return text;
        }
        self.cut_from.get_or_insert(text.len());
        let end = text.floor_char_boundary(self.max_bytes);
        match text {
            Cow::Borrowed(text) => Cow::Borrowed(&text[..end]),
            Cow::Owned(mut text) => {
                text.truncate(end);
                Cow::Owned(text)
            }
        }
    }
}

/// Writes a raw value without blanks between its tokens, with its strings (not its keys) cut.
pub fn write_compact(raw: &str, cutter: &mut Cutter, out: &mut String) {
    let bytes = raw.as_bytes();
    let mut at = 0;
    let mut copied = 0;
    while at < bytes.len() {
        match bytes[at] {
            b'"' => {
                let end = string_end(bytes, at);
                // Text is never longer than its raw form.
                let text = &raw[at..end];
                if text.len() > cutter.max_bytes
                    && !is_key(&bytes[end..])
                    && let Some(decoded) = string(text)
                {
                    out.push_str(&raw[copied..at]);
                    write_string(&cutter.cut(decoded), out);
                    copied = end;
                }
                at = end;
            }
            b' ' | b'\t' | b'\n' | b'\r' => {
                out.push_str(&raw[copied..at]);
                at += 1;
                copied = at;
            }
            _ => at += 1,
        }
    }
    out.push_str(&raw[copied..]);
}

/// [`write_compact`] that copies only when something changes.
pub fn compact<'a>(raw: &'a str, cutter: &mut Cutter) -> Cow<'a, str> {
    if raw.len() <= cutter.max_bytes
        && !raw
            .bytes()
            .any(|b| matches!(b, b' ' | b'\t' | b'\n' | b'\r'))
    {
        return Cow::Borrowed(raw);
    }
    let mut out = String::with_capacity(raw.len());
    write_compact(raw, cutter, &mut out);
    Cow::Owned(out)
}

/// Where the raw string at `at` ends.
fn string_end(bytes: &[u8], at: usize) -> usize {
    let mut at = at + 1;
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'"' => return at + 1,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    bytes.len()
}

fn is_key(rest: &[u8]) -> bool {
    rest.iter()
        .find(|b| !b.is_ascii_whitespace())
        .is_some_and(|&b| b == b':')
}

/// Writes a raw value in the one form that depends on its value only, whatever path it took: keys in the order
/// of jsonb (by length, then bytes) and the last of equal ones, numbers by value.
pub fn write_canonical(raw: &str, cutter: &mut Cutter, out: &mut String) -> Result<(), EventError> {
    canonical_levels(raw, MAX_DEPTH, cutter, out)
}

/// Recursive, hence the levels; what is deeper, which only INSERT can store, is compact but not sorted.
fn canonical_levels(
    raw: &str,
    levels: usize,
    cutter: &mut Cutter,
    out: &mut String,
) -> Result<(), EventError> {
    match kind(raw) {
        Kind::Array | Kind::Object if levels == 0 => write_compact(raw, cutter, out),
        Kind::Null | Kind::Bool => out.push_str(raw),
        Kind::Number => match Number::parse(raw) {
            Some(number) => number.write(out),
            None => out.push_str(raw),
        },
        Kind::String => match string(raw) {
            Some(text) => write_string(&cutter.cut(text), out),
            None => out.push_str(raw),
        },
        Kind::Array => {
            let mut elements = Vec::new();
            array_elements(raw, |element| elements.push(element))?;
            out.push('[');
            for (i, element) in elements.into_iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                canonical_levels(element, levels - 1, cutter, out)?;
            }
            out.push(']');
        }
        Kind::Object => {
            let mut entries: Vec<(String, &str)> = Vec::new();
            object_entries(raw, |key, value| entries.push((key.to_owned(), value)))?;
            // Stable, so that of equal keys the last stays last.
            entries.sort_by(|(a, _), (b, _)| a.len().cmp(&b.len()).then_with(|| a.cmp(b)));
            entries.reverse();
            entries.dedup_by(|(key, _), (last, _)| key == last);
            out.push('{');
            for (i, (key, value)) in entries.iter().rev().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                write_string(key, out);
                out.push(':');
                canonical_levels(value, levels - 1, cutter, out)?;
            }
            out.push('}');
        }
    }
    Ok(())
}

/// Writes one JSON object after another into one buffer.
#[derive(Debug, Default)]
pub struct ObjectWriter(String);

impl ObjectWriter {
    /// Starts an object.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Writes a key; the caller appends its value to what this answers.
    pub fn key(&mut self, name: &str) -> &mut String {
        self.0.push(if self.0.is_empty() { '{' } else { ',' });
        write_string(name, &mut self.0);
        self.0.push(':');
        &mut self.0
    }

    /// The object, if it has any key.
    pub fn finish(&mut self) -> Option<&str> {
        if self.0.is_empty() {
            return None;
        }
        self.0.push('}');
        Some(&self.0)
    }
}

#[cfg(test)]
mod tests;
