//! The bytes of Postgres' jsonb as the text that `jsonb::text` gives, without the server.
//!
//! The form is that of `src/include/utils/jsonb.h` and `numeric.c`, unchanged since 9.4: a container is a header,
//! one entry per element (of an object all keys, then all values), and their data. Nothing is trusted: what does
//! not look like it is answered by None.

use std::slice::Iter;

use crate::json;

pub mod events;

/// Containers: their kind and the number of elements or pairs.
const SCALAR: u32 = 0x1000_0000;
const OBJECT: u32 = 0x2000_0000;
const ARRAY: u32 = 0x4000_0000;
const COUNT: u32 = 0x0FFF_FFFF;

/// Entries: what the data is, and its length or (every 32nd) the offset of its end.
const HAS_OFFSET: u32 = 0x8000_0000;
const LENGTH: u32 = 0x0FFF_FFFF;
const TYPE: u32 = 0x7000_0000;
const STRING: u32 = 0x0000_0000;
const NUMERIC: u32 = 0x1000_0000;
const FALSE: u32 = 0x2000_0000;
const TRUE: u32 = 0x3000_0000;
const NULL: u32 = 0x4000_0000;
const CONTAINER: u32 = 0x5000_0000;

/// Numerics and containers begin at a multiple of this, counted from the first data of their container.
const ALIGNMENT: usize = 4;
/// The length word of a numeric.
const VARLENA_HEADER: usize = 4;
/// The first two bits of a numeric's header.
const SHORT: u16 = 0x8000;
const SPECIAL: u16 = 0xC000;

/// The header of a number with a weight and a scale of zero.
const SMALL: [u8; 2] = SHORT.to_ne_bytes();

/// The longest text that the server can make. Twelve bytes of jsonb may be a number of 131,072 digits: what would be longer
/// is left to the server, whose error it is.
const MAX_TEXT_BYTES: usize = 0x3FFF_FFFF;

/// The text of a jsonb value; `bytes` are those of its root container, without the length word.
pub fn to_text(bytes: &[u8]) -> Option<String> {
    to_text_within(bytes, MAX_TEXT_BYTES)
}

/// [`to_text`], of at most so many bytes.
fn to_text_within(bytes: &[u8], most: usize) -> Option<String> {
    let mut out = Vec::with_capacity(room_for(bytes));
    print(Container::new(bytes)?, &mut out, most)?;
    String::from_utf8(out).ok()
}

/// The text of short keys and numbers is about as long as their entries and data.
pub fn room_for(bytes: &[u8]) -> usize {
    bytes.len() + bytes.len() / 8
}

/// Writes a container, without recursion; answers how many levels it has.
fn print(container: Container<'_>, out: &mut Vec<u8>, most: usize) -> Option<usize> {
    out.extend(container.opening());
    let mut open = vec![container];
    let mut levels = 1;
    while let Some(container) = open.last_mut() {
        let is_first = std::mem::take(&mut container.is_first);
        let Some(element) = container.next()? else {
            out.extend(container.closing());
            open.pop();
            continue;
        };
        if !is_first {
            out.extend_from_slice(b", ");
        }
        if let Some(key) = element.key {
            json::write_bytes(key, out);
            out.extend_from_slice(b": ");
        }
        if element.kind == CONTAINER {
            let inner = Container::new(element.data)?;
            out.extend(inner.opening());
            open.push(inner);
            levels = levels.max(open.len());
        } else {
            print_scalar(&element, out)?;
        }
        if out.len() > most {
            return None;
        }
    }
    Some(levels)
}

#[inline]
fn print_scalar(element: &Element<'_>, out: &mut Vec<u8>) -> Option<()> {
    match element.kind {
        STRING => json::write_bytes(element.data, out),
        NUMERIC => write_numeric(element.data.get(VARLENA_HEADER..)?, out)?,
        FALSE => out.extend_from_slice(b"false"),
        TRUE => out.extend_from_slice(b"true"),
        NULL => out.extend_from_slice(b"null"),
        _ => return None,
    }
    Some(())
}

/// A container that is being read.
struct Container<'a> {
    kind: u32,
    /// Entries that are still to be read: of keys (none where there are no pairs), and of elements or values.
    keys: Iter<'a, [u8; 4]>,
    values: Iter<'a, [u8; 4]>,
    data: &'a [u8],
    /// Where in the data the next key, and the next element or value, begins.
    key_at: usize,
    value_at: usize,
    is_first: bool,
}

struct Element<'a> {
    key: Option<&'a [u8]>,
    kind: u32,
    data: &'a [u8],
}

impl<'a> Container<'a> {
    fn new(bytes: &'a [u8]) -> Option<Self> {
        let (header, rest) = word(bytes)?;
        let kind = header & !COUNT;
        let count = (header & COUNT) as usize;
        let (keys, values) = match kind {
            OBJECT => (count, count),
            ARRAY => (0, count),
            _ if kind == ARRAY | SCALAR && count == 1 => (0, 1),
            _ => return None,
        };
        let (entries, data) = rest.split_at_checked((keys + values).checked_mul(4)?)?;
        let (entries, _) = entries.as_chunks::<4>();
        let (keys, values) = entries.split_at_checked(keys)?;
        Some(Self {
            kind,
            keys: keys.iter(),
            values: values.iter(),
            data,
            key_at: 0,
            value_at: end_of(keys),
            is_first: true,
        })
    }

    fn opening(&self) -> Option<u8> {
        match self.kind {
            OBJECT => Some(b'{'),
            ARRAY => Some(b'['),
            _ => None,
        }
    }

    fn closing(&self) -> Option<u8> {
        match self.kind {
            OBJECT => Some(b'}'),
            ARRAY => Some(b']'),
            _ => None,
        }
    }

    /// The next element or pair; None inside where there is none left.
    #[inline(always)]
    fn next(&mut self) -> Option<Option<Element<'a>>> {
        let Some(value) = self.values.next() else {
            return Some(None);
        };
        let mut key = None;
        if self.kind == OBJECT {
            let (kind, text, end) = read(self.keys.next()?, self.data, self.key_at)?;
            if kind != STRING {
                return None;
            }
            self.key_at = end;
            key = Some(text);
        }
        let (kind, data, end) = read(value, self.data, self.value_at)?;
        self.value_at = end;
        Some(Some(Element { key, kind, data }))
    }
}

/// Where the data of these entries ends: by their lengths, back to one that has an offset.
fn end_of(entries: &[[u8; 4]]) -> usize {
    let mut end = 0;
    for entry in entries.iter().rev() {
        let entry = u32::from_ne_bytes(*entry);
        end += (entry & LENGTH) as usize;
        if entry & HAS_OFFSET != 0 {
            break;
        }
    }
    end
}

/// The type and data of an entry whose data begins at `start`, and where it ends.
#[inline(always)]
fn read<'a>(entry: &[u8; 4], data: &'a [u8], start: usize) -> Option<(u32, &'a [u8], usize)> {
    let entry = u32::from_ne_bytes(*entry);
    let length = (entry & LENGTH) as usize;
    let end = match entry & HAS_OFFSET {
        0 => start + length,
        _ => length,
    };
    let kind = entry & TYPE;
    let begin = match kind {
        NUMERIC | CONTAINER => start.next_multiple_of(ALIGNMENT),
        _ => start,
    };
    Some((kind, data.get(begin..end)?, end))
}

fn word(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (word, rest) = bytes.split_first_chunk::<4>()?;
    Some((u32::from_ne_bytes(*word), rest))
}

/// A numeric without its length word, with all digits of its display scale.
fn write_numeric(bytes: &[u8], out: &mut Vec<u8>) -> Option<()> {
    // Most numbers are positive, whole and below 10,000.
    if let Ok([a, b, low, high]) = <[u8; 4]>::try_from(bytes)
        && [a, b] == SMALL
    {
        return write_small(u16::from_ne_bytes([low, high]), out);
    }
    let (header, rest) = half(bytes)?;
    let (negative, scale, weight, digits) = match header & SPECIAL {
        // NaN and the infinities, which jsonb cannot hold.
        SPECIAL => return None,
        SHORT => {
            // Six bits and a sign.
            let weight = i32::from(header & 0x3F) - i32::from(header & 0x40);
            let scale = usize::from(header >> 7 & 0x3F);
            (header & 0x2000 != 0, scale, weight, rest)
        }
        sign => {
            let (weight, rest) = half(rest)?;
            let scale = usize::from(header & 0x3FFF);
            (sign != 0, scale, i32::from(weight as i16), rest)
        }
    };
    // A digit has base 10,000; those that are not there are zeros.
    let digit = |at: i32| -> u16 {
        usize::try_from(at)
            .ok()
            .and_then(|at| digits.get(at * 2..))
            .and_then(half)
            .map_or(0, |(digit, _)| digit)
    };
    if negative {
        out.push(b'-');
    }
    if weight < 0 {
        out.push(b'0');
    } else {
        write_small(digit(0), out)?;
        for at in 1..=weight {
            out.extend_from_slice(&four_digits(digit(at))?);
        }
    }
    if scale > 0 {
        out.push(b'.');
        let mut missing = scale;
        let mut at = weight + 1;
        while missing > 0 {
            let text = four_digits(digit(at))?;
            out.extend_from_slice(text.get(..missing).unwrap_or(&text));
            missing = missing.saturating_sub(4);
            at += 1;
        }
    }
    Some(())
}

fn write_small(digit: u16, out: &mut Vec<u8>) -> Option<()> {
    let digits = four_digits(digit)?;
    let zeros = usize::from(digit < 1_000) + usize::from(digit < 100) + usize::from(digit < 10);
    out.extend_from_slice(digits.get(zeros..)?);
    Some(())
}

fn half(bytes: &[u8]) -> Option<(u16, &[u8])> {
    let (half, rest) = bytes.split_first_chunk::<2>()?;
    Some((u16::from_ne_bytes(*half), rest))
}

fn four_digits(digit: u16) -> Option<[u8; 4]> {
    if digit > 9_999 {
        return None;
    }
    let ascii = |n: u16| b'0' + (n % 10) as u8;
    Some([
        ascii(digit / 1_000),
        ascii(digit / 100),
        ascii(digit / 10),
        ascii(digit),
    ])
}

#[cfg(test)]
mod tests;
