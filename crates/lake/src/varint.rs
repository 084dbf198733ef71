//! Numbers in few bytes: LEB128, and signed ones folded so that small magnitudes stay short.

pub(crate) fn put_number(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Takes a number off the front; None: it has no end, or more than 64 bits.
pub fn get_number(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = *rest.split_off_first()?;
        let bits = u64::from(byte & 0x7f);
        if bits.leading_zeros() < shift {
            return None;
        }
        value |= bits << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

pub(crate) fn put_signed(out: &mut Vec<u8>, value: i64) {
    put_number(out, ((value << 1) ^ (value >> 63)) as u64);
}

pub(crate) fn get_signed(rest: &mut &[u8]) -> Option<i64> {
    let folded = get_number(rest)?;
    Some((folded >> 1) as i64 ^ -((folded & 1) as i64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back() {
        for value in [0, 1, -1, 63, -64, 64, i64::MAX, i64::MIN] {
            let mut bytes = Vec::new();
            put_signed(&mut bytes, value);
            put_number(&mut bytes, value as u64);
            let mut rest = &bytes[..];
            assert_eq!(get_signed(&mut rest), Some(value));
            assert_eq!(get_number(&mut rest), Some(value as u64));
            assert!(rest.is_empty());
        }
        let mut short = Vec::new();
        put_signed(&mut short, -64);
        assert_eq!(short.len(), 1);
    }

    #[test]
    fn what_is_no_number_is_refused() {
        assert_eq!(get_number(&mut &[0x80u8; 3][..]), None);
        assert_eq!(get_number(&mut &[0xffu8; 10][..]), None);
    }
}
