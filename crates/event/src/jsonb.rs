//! The bytes of Postgres' jsonb as the text that `jsonb::text` gives, without the server.
//!
//! The form is that of `src/include/utils/jsonb.h` and `numeric.c`, unchanged since 9.4: a container is a header,
//! one entry per element (of an object all keys, then all values), and their data. Nothing is trusted: what does
//! not look like it is answered by None.

use crate::json;

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

/// The longest text that the server can make. Twelve bytes of jsonb may be a number of 131,072 digits: what would be longer
/// is left to the server, whose error it is.
const MAX_TEXT_BYTES: usize = 0x3FFF_FFFF;

/// The text of a jsonb value; `bytes` are those of its root container, without the length word.
pub fn to_text(bytes: &[u8]) -> Option<String> {
    to_text_within(bytes, MAX_TEXT_BYTES)
}

/// [`to_text`], of at most so many bytes.
fn to_text_within(bytes: &[u8], most: usize) -> Option<String> {
    // The text of short keys and numbers is about as long as their entries and data.
    let mut out = Vec::with_capacity(bytes.len() + bytes.len() / 8);
    let mut open = vec![Container::new(bytes)?];
    if let Some(byte) = open.last()?.opening() {
        out.push(byte);
    }
    while let Some(container) = open.last_mut() {
        let Some(element) = container.next()? else {
            out.extend(container.closing());
            open.pop();
            continue;
        };
        if element.index > 0 {
            out.extend_from_slice(b", ");
        }
        if let Some(key) = element.key {
            json::write_bytes(key, &mut out);
            out.extend_from_slice(b": ");
        }
        match element.kind {
            STRING => json::write_bytes(element.data, &mut out),
            NUMERIC => write_numeric(element.data.get(VARLENA_HEADER..)?, &mut out)?,
            FALSE => out.extend_from_slice(b"false"),
            TRUE => out.extend_from_slice(b"true"),
            NULL => out.extend_from_slice(b"null"),
            CONTAINER => {
                let inner = Container::new(element.data)?;
                out.extend(inner.opening());
                open.push(inner);
            }
            _ => return None,
        }
        if out.len() > most {
            return None;
        }
    }
    String::from_utf8(out).ok()
}

/// A container that is being read.
struct Container<'a> {
    /// The entries and the data.
    entries: &'a [u8],
    data: &'a [u8],
    kind: u32,
    count: usize,
    /// The next element or pair.
    index: usize,
    /// Where in the data the next key, and the next element or value, begins.
    key_at: usize,
    value_at: usize,
}

struct Element<'a> {
    index: usize,
    key: Option<&'a [u8]>,
    kind: u32,
    data: &'a [u8],
}

impl<'a> Container<'a> {
    fn new(bytes: &'a [u8]) -> Option<Self> {
        let (header, rest) = word(bytes)?;
        let kind = header & !COUNT;
        let count = (header & COUNT) as usize;
        let entries = match kind {
            OBJECT => count.checked_mul(2)?,
            ARRAY => count,
            _ if kind == ARRAY | SCALAR && count == 1 => 1,
            _ => return None,
        };
        let (entries, data) = rest.split_at_checked(entries.checked_mul(4)?)?;
        let mut container = Self {
            entries,
            data,
            kind,
            count,
            index: 0,
            key_at: 0,
            value_at: 0,
        };
        if kind == OBJECT {
            container.value_at = container.start_of(count)?;
        }
        Some(container)
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

    fn entry(&self, index: usize) -> Option<u32> {
        word(self.entries.get(index * 4..)?).map(|(entry, _)| entry)
    }

    /// Where the data of an entry begins: by the lengths of those before it, back to one that has an offset.
    fn start_of(&self, index: usize) -> Option<usize> {
        let mut start = 0;
        for before in (0..index).rev() {
            let entry = self.entry(before)?;
            start += (entry & LENGTH) as usize;
            if entry & HAS_OFFSET != 0 {
                break;
            }
        }
        Some(start)
    }

    /// The type and data of an entry whose data begins at `start`, and where it ends.
    fn read(&self, index: usize, start: usize) -> Option<(u32, &'a [u8], usize)> {
        let entry = self.entry(index)?;
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
        Some((kind, self.data.get(begin..end)?, end))
    }

    /// The next element or pair; None inside where there is none left.
    fn next(&mut self) -> Option<Option<Element<'a>>> {
        let index = self.index;
        if index == self.count {
            return Some(None);
        }
        self.index += 1;
        let mut key = None;
        let mut at = index;
        if self.kind == OBJECT {
            let (kind, text, end) = self.read(index, self.key_at)?;
            if kind != STRING {
                return None;
            }
            self.key_at = end;
            key = Some(text);
            at += self.count;
        }
        let (kind, data, end) = self.read(at, self.value_at)?;
        self.value_at = end;
        Some(Some(Element {
            index,
            key,
            kind,
            data,
        }))
    }
}

fn word(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (word, rest) = bytes.split_first_chunk::<4>()?;
    Some((u32::from_ne_bytes(*word), rest))
}

/// A numeric without its length word, with all digits of its display scale.
fn write_numeric(bytes: &[u8], out: &mut Vec<u8>) -> Option<()> {
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
        let first = four_digits(digit(0))?;
        let zeros = first.iter().take(3).take_while(|b| **b == b'0').count();
        out.extend(first.iter().skip(zeros));
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
