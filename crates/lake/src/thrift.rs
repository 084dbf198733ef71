//! A walk over Thrift's compact protocol that finds out whether bytes are what they claim to be.
//!
//! The Parquet library allocates what the lengths in a file say before it has seen the bytes, and a failed allocation ends
//! the process. It is only given structures that have been walked: every list and every text lies within the bytes, and
//! every field is of the type that the library will take it for.

/// Nesting of fields that nobody knows.
const MAX_DEPTH: usize = 32;

/// What a field, or an element of a list, is to be.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Type {
    Bool,
    I8,
    I16,
    I32,
    I64,
    Double,
    Binary,
    List(&'static Type),
    Struct(Struct),
}

/// The known fields of a structure, or of a union, by their ids. Others are passed over.
pub(crate) type Struct = &'static [(i64, Type)];

/// Why bytes are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// They end too early: more of them may be right.
    Truncated,
    Malformed,
}

type Walked<T> = Result<T, Fault>;

/// Wire types.
const STOP: u8 = 0;
const TRUE: u8 = 1;
const FALSE: u8 = 2;
const I8: u8 = 3;
const I16: u8 = 4;
const I32: u8 = 5;
const I64: u8 = 6;
const DOUBLE: u8 = 7;
const BINARY: u8 = 8;
const LIST: u8 = 9;
const SET: u8 = 10;
const MAP: u8 = 11;
const STRUCT: u8 = 12;
const UUID: u8 = 13;

impl Type {
    fn is(self, wire: u8) -> bool {
        match self {
            Self::Bool => matches!(wire, TRUE | FALSE),
            Self::I8 => wire == I8,
            Self::I16 => wire == I16,
            Self::I32 => wire == I32,
            Self::I64 => wire == I64,
            Self::Double => wire == DOUBLE,
            Self::Binary => wire == BINARY,
            Self::List(_) => wire == LIST,
            Self::Struct(_) => wire == STRUCT,
        }
    }
}

/// Walks a structure at the front of `bytes`, calling `number` with the id and value of each of its integers and truth values, and
/// of those of the structures in it with the id of that one before. Answers how many bytes it takes.
pub(crate) fn walk(
    bytes: &[u8],
    structure: Struct,
    mut number: impl FnMut(Option<i64>, i64, i64),
) -> Walked<usize> {
    let mut walker = Walker { rest: bytes };
    walker.structure(structure, None, 0, &mut number)?;
    Ok(bytes.len() - walker.rest.len())
}

fn fields_of(ty: Option<Type>) -> Struct {
    match ty {
        Some(Type::Struct(known)) => known,
        _ => &[],
    }
}

struct Walker<'a> {
    rest: &'a [u8],
}

impl Walker<'_> {
    fn byte(&mut self) -> Walked<u8> {
        self.rest.split_off_first().copied().ok_or(Fault::Truncated)
    }

    fn skip(&mut self, bytes: usize) -> Walked<()> {
        self.rest
            .split_off(..bytes)
            .map(drop)
            .ok_or(Fault::Truncated)
    }

    fn varint(&mut self) -> Walked<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(Fault::Malformed)
    }

    fn zigzag(&mut self) -> Walked<i64> {
        let folded = self.varint()?;
        Ok((folded >> 1) as i64 ^ -((folded & 1) as i64))
    }

    fn structure(
        &mut self,
        known: Struct,
        outer: Option<i64>,
        depth: usize,
        number: &mut dyn FnMut(Option<i64>, i64, i64),
    ) -> Walked<()> {
        if depth > MAX_DEPTH {
            return Err(Fault::Malformed);
        }
        let mut id = 0_i64;
        loop {
            let head = self.byte()?;
            let wire = head & 0x0f;
            if wire == STOP {
                return Ok(());
            }
            id = match head >> 4 {
                0 => self.zigzag()?,
                delta => id + i64::from(delta),
            };
            // Of others the library takes 16 bits, which may be those of a known one.
            if !(0..=i64::from(i16::MAX)).contains(&id) {
                return Err(Fault::Malformed);
            }
            let ty = known
                .iter()
                .find(|(known, _)| *known == id)
                .map(|(_, ty)| *ty);
            if ty.is_some_and(|ty| !ty.is(wire)) {
                return Err(Fault::Malformed);
            }
            match wire {
                // The value of a field, unlike that of an element, is in its head.
                TRUE | FALSE => number(outer, id, i64::from(wire == TRUE)),
                I16 | I32 | I64 => number(outer, id, self.zigzag()?),
                STRUCT if depth == 0 => self.structure(fields_of(ty), Some(id), 1, number)?,
                _ => self.value(wire, ty, depth)?,
            }
        }
    }

    fn value(&mut self, wire: u8, ty: Option<Type>, depth: usize) -> Walked<()> {
        match wire {
            TRUE | FALSE | I8 => self.skip(1),
            I16 | I32 | I64 => self.varint().map(drop),
            DOUBLE => self.skip(8),
            UUID => self.skip(16),
            BINARY => {
                let length = self.varint()?;
                self.skip(usize::try_from(length).map_err(|_| Fault::Malformed)?)
            }
            LIST | SET => {
                let head = self.byte()?;
                let size = match head >> 4 {
                    15 => self.varint()?,
                    size => u64::from(size),
                };
                let element = match ty {
                    Some(Type::List(element)) => Some(*element),
                    _ => None,
                };
                self.elements(size, head & 0x0f, element, depth)
            }
            MAP => {
                let size = self.varint()?;
                if size == 0 {
                    return Ok(());
                }
                let types = self.byte()?;
                for _ in 0..size {
                    self.value(types >> 4, None, depth + 1)?;
                    self.value(types & 0x0f, None, depth + 1)?;
                }
                Ok(())
            }
            STRUCT => self.structure(fields_of(ty), None, depth + 1, &mut |_, _, _| ()),
            _ => Err(Fault::Malformed),
        }
    }

    fn elements(&mut self, size: u64, wire: u8, ty: Option<Type>, depth: usize) -> Walked<()> {
        if depth > MAX_DEPTH {
            return Err(Fault::Malformed);
        }
        // Some writers give the elements of an empty list no type.
        if size > 0 && ty.is_some_and(|ty| !ty.is(wire)) {
            return Err(Fault::Malformed);
        }
        // Each element takes a byte at least.
        if size > self.rest.len() as u64 {
            return Err(Fault::Truncated);
        }
        (0..size).try_for_each(|_| self.value(wire, ty, depth + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INNER: Struct = &[(1, Type::I64)];
    const OUTER: Struct = &[
        (1, Type::I32),
        (2, Type::List(&Type::Struct(INNER))),
        (3, Type::Binary),
        (4, Type::Bool),
    ];

    fn walked(bytes: &[u8]) -> (Walked<usize>, Vec<(i64, i64)>) {
        let mut numbers = Vec::new();
        let end = walk(bytes, OUTER, |_, id, value| numbers.push((id, value)));
        (end, numbers)
    }

    #[test]
    fn a_structure_is_walked_to_its_end() {
        // 1: -3, 2: [{1: 64}, {}], 3: "ab", 4: true, 20: {"x": 1.0}, and a byte behind it.
        let bytes = b"\x15\x05\x19\x2c\x16\x80\x01\x00\x00\x18\x02ab\x11\x0b\x28\x01\x87\x01x\0\0\0\0\0\0\xf0\x3f\x00!";
        let (end, numbers) = walked(bytes);
        assert_eq!(end, Ok(bytes.len() - 1));
        assert_eq!(numbers, [(1, -3), (4, 1)]);
        for end in 0..bytes.len() - 1 {
            assert_eq!(walked(&bytes[..end]).0, Err(Fault::Truncated), "{end}");
        }
    }

    #[test]
    fn what_claims_too_much_is_refused() {
        for (bytes, fault) in [
            // A list of 2^31 structures, a text of 2^40 bytes.
            (&b"\x29\xfc\xff\xff\xff\xff\x07\x00"[..], Fault::Truncated),
            (b"\x38\x80\x80\x80\x80\x80\x20ab\x00", Fault::Truncated),
            // A list that says it is a text, elements that say they are texts.
            (b"\x28\x02\xfc\x7f\x00", Fault::Malformed),
            (b"\x29\x18\x01a\x00", Fault::Malformed),
            // A number without end, no type.
            (
                b"\x15\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x00",
                Fault::Malformed,
            ),
            (b"\x7e\x00", Fault::Malformed),
        ] {
            assert_eq!(walked(bytes).0, Err(fault), "{bytes:x?}");
        }
        let deep = [0x7c; 100];
        assert_eq!(walked(&deep).0, Err(Fault::Malformed));
    }
}
