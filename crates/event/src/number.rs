//! Numbers as their decimal text: judged by value (1.0 = 1 = 1e0), exact until a column's type rounds them.

use std::fmt::Write;

/// Whole numbers up to this size are exact in double precision.
const EXACT_FLOAT8: u64 = 1 << 53;
/// Limits of Postgres' numeric: digits before and after the decimal point.
const NUMERIC_WEIGHT_DIGITS: i64 = 131_072;
const NUMERIC_SCALE_DIGITS: i64 = 16_383;
/// Plain notation may add this many zeros to the written digits; beyond it the text form has an exponent, so
/// that `1e131071` in an event does not become 128 kB of text.
const MAX_PADDING: i64 = 40;
/// Exponents beyond this, far beyond those of numeric, are all the same.
const MAX_EXPONENT: i64 = u32::MAX as i64;

/// A decimal number in normal form: the digits `head` then `tail`, without outer zeros, the last of them
/// worth 10^`last`. Zero has no digits and no sign.
#[derive(Debug, Clone, Copy)]
pub struct Number<'a> {
    text: &'a str,
    negative: bool,
    head: &'a [u8],
    tail: &'a [u8],
    last: i64,
    /// As written, for the limits of numeric.
    exponent: i64,
    scale: i64,
}

impl<'a> Number<'a> {
    /// A number of JSON, or what else Postgres reads as one: outer blanks, `+1`, `.5`, `5.`; never NaN,
    /// infinity or a number in another base.
    pub fn parse(text: &'a str) -> Option<Self> {
        let text = text.trim_matches(|c: char| c.is_ascii_whitespace());
        let (negative, rest) = match text.as_bytes() {
            [b'-', rest @ ..] => (true, rest),
            [b'+', rest @ ..] => (false, rest),
            rest => (false, rest),
        };
        let (head, rest) = digits(rest);
        let (tail, rest) = match rest {
            [b'.', rest @ ..] => digits(rest),
            rest => (&rest[..0], rest),
        };
        if head.is_empty() && tail.is_empty() {
            return None;
        }
        let exponent = match rest {
            [] => 0,
            [b'e' | b'E', rest @ ..] => {
                let (minus, rest) = match rest {
                    [b'-', rest @ ..] => (true, rest),
                    [b'+', rest @ ..] => (false, rest),
                    rest => (false, rest),
                };
                let (power, end) = digits(rest);
                if power.is_empty() || !end.is_empty() {
                    return None;
                }
                let power = power.iter().fold(0_i64, |n, b| {
                    (n * 10 + i64::from(b - b'0')).min(MAX_EXPONENT)
                });
                if minus { -power } else { power }
            }
            _ => return None,
        };
        let scale = tail.len() as i64 - exponent;
        let mut number = Self {
            text,
            negative,
            head: trim_start(head),
            tail: trim_end(tail),
            last: 0,
            exponent,
            scale,
        };
        number.last = exponent - number.tail.len() as i64;
        if number.tail.is_empty() {
            let trimmed = trim_end(number.head);
            number.last += (number.head.len() - trimmed.len()) as i64;
            number.head = trimmed;
        }
        if number.head.is_empty() {
            number.tail = trim_start(number.tail);
        }
        if number.len() == 0 {
            number.negative = false;
            number.last = 0;
        }
        Some(number)
    }

    fn len(&self) -> i64 {
        (self.head.len() + self.tail.len()) as i64
    }

    fn digits(&self) -> impl Iterator<Item = u8> + 'a {
        self.head.iter().chain(self.tail).copied()
    }

    pub fn is_zero(&self) -> bool {
        self.len() == 0
    }

    pub fn is_whole(&self) -> bool {
        self.last >= 0
    }

    /// Whether it is whole and beyond ±2^53, where double precision starts to skip whole numbers.
    pub fn is_beyond_float8(&self) -> bool {
        self.is_whole()
            && self
                .to_i64()
                .is_none_or(|value| value.unsigned_abs() > EXACT_FLOAT8)
    }

    /// Whether Postgres could hold it in jsonb.
    pub fn fits_numeric(&self) -> bool {
        let exponent_limit = i64::from(i32::MAX / 2);
        self.exponent.abs() < exponent_limit
            && self.scale <= NUMERIC_SCALE_DIGITS
            && self.len() + self.last <= NUMERIC_WEIGHT_DIGITS
    }

    /// The value, if it is whole and has 64 bits.
    pub fn to_i64(&self) -> Option<i64> {
        if !self.is_whole() {
            return None;
        }
        self.scaled(0)?.try_into().ok()
    }

    /// The value times 10^`scale`, rounded half away from zero as a cast to numeric does; None beyond 38 digits.
    pub fn scaled(&self, scale: u8) -> Option<i128> {
        let shift = self.last + i64::from(scale);
        let keep = self.len() + shift.min(0);
        if self.len() + shift > 38 {
            return None;
        }
        if keep < 0 {
            return Some(0);
        }
        let mut digits = self.digits();
        let mut value = digits
            .by_ref()
            .take(keep as usize)
            .fold(0_i128, |n, b| n * 10 + i128::from(b - b'0'));
        if shift >= 0 {
            // At most 38 digits in all, which i128 holds.
            value *= 10_i128.pow(shift as u32);
        } else if digits.next().is_some_and(|b| b >= b'5') {
            value += 1;
        }
        Some(if self.negative { -value } else { value })
    }

    /// The nearest double; None on overflow, on underflow to zero, and for a whole number beyond ±2^53 that
    /// would become another number.
    pub fn to_f64(&self) -> Option<f64> {
        let value: f64 = self.text.parse().ok()?;
        if self.is_zero() {
            return Some(0.0);
        }
        if !value.is_finite() || value == 0.0 {
            return None;
        }
        if self.is_beyond_float8() {
            let shown = format!("{value:e}");
            if !Number::parse(&shown).is_some_and(|n| n.same_value(self)) {
                return None;
            }
        }
        Some(value)
    }

    /// The nearest real; None on overflow and on underflow to zero.
    pub fn to_f32(&self) -> Option<f32> {
        let value: f32 = self.text.parse().ok()?;
        if self.is_zero() {
            return Some(0.0);
        }
        (value.is_finite() && value != 0.0).then_some(value)
    }

    fn same_value(&self, other: &Number<'_>) -> bool {
        self.negative == other.negative
            && self.last == other.last
            && self.digits().eq(other.digits())
    }

    /// The text of the value, the same however it was written.
    pub fn write(&self, out: &mut String) {
        if self.negative {
            out.push('-');
        }
        let point = self.len() + self.last;
        let padding = self.last.max(0).max(-point);
        if padding > MAX_PADDING {
            for (i, digit) in self.digits().enumerate() {
                if i == 1 {
                    out.push('.');
                }
                out.push(char::from(digit));
            }
            // Writing into a String cannot fail.
            let _ = write!(out, "e{}", (point - 1).clamp(-MAX_EXPONENT, MAX_EXPONENT));
            return;
        }
        if point <= 0 {
            out.push('0');
            if self.is_zero() {
                return;
            }
            out.push('.');
            out.extend((point..0).map(|_| '0'));
        }
        for (i, digit) in self.digits().enumerate() {
            if i > 0 && i as i64 == point {
                out.push('.');
            }
            out.push(char::from(digit));
        }
        out.extend((0..self.last).map(|_| '0'));
    }
}

/// A whole number that is written with at most `digits` (18) digits and nothing else but its sign.
pub fn short_whole(raw: &str, digits: usize) -> Option<i64> {
    let (negative, written) = match raw.as_bytes() {
        [b'-', rest @ ..] => (true, rest),
        rest => (false, rest),
    };
    if written.is_empty() || written.len() > digits {
        return None;
    }
    let mut value = 0;
    for &byte in written {
        let digit = byte.wrapping_sub(b'0');
        if digit > 9 {
            return None;
        }
        value = value * 10 + i64::from(digit);
    }
    Some(if negative { -value } else { value })
}

fn digits(bytes: &[u8]) -> (&[u8], &[u8]) {
    let end = bytes
        .iter()
        .position(|b| !b.is_ascii_digit())
        .unwrap_or(bytes.len());
    bytes.split_at(end)
}

fn trim_start(digits: &[u8]) -> &[u8] {
    let start = digits
        .iter()
        .position(|&b| b != b'0')
        .unwrap_or(digits.len());
    &digits[start..]
}

fn trim_end(digits: &[u8]) -> &[u8] {
    let end = digits.iter().rposition(|&b| b != b'0').map_or(0, |i| i + 1);
    &digits[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(text: &str) -> Number<'_> {
        Number::parse(text).unwrap_or_else(|| panic!("{text} is a number"))
    }

    #[test]
    fn text_depends_on_the_value_only() {
        for (texts, expected) in [
            (
                &["1", "1.0", "1e0", "10e-1", "0.1e1", "+1", "01", " 1 ", "1."][..],
                "1",
            ),
            (&["0", "-0", "0.000", "0e99", "-0e-5", ".0"], "0"),
            (&["-12.5", "-125e-1", "-12.50"], "-12.5"),
            (&["0.05", "5e-2", ".05"], "0.05"),
            (&["1200", "1.2e3"], "1200"),
            (&["1e40"], "10000000000000000000000000000000000000000"),
            (&["1e41", "10e40"], "1e41"),
            (&["123e131000"], "1.23e131002"),
            (&["1.5e-100"], "1.5e-100"),
            (&["1000000.25"], "1000000.25"),
        ] {
            for text in texts {
                let mut out = String::new();
                number(text).write(&mut out);
                assert_eq!(out, expected, "{text}");
            }
        }
        for text in [
            "", "-", "e1", "1e", "1e+", "NaN", "Infinity", "0x10", "1 2", "1_0", ".", "1a",
        ] {
            assert!(Number::parse(text).is_none(), "{text}");
        }
    }

    #[test]
    fn integers_are_exact() {
        assert_eq!(number("9223372036854775807").to_i64(), Some(i64::MAX));
        assert_eq!(number("-9223372036854775808").to_i64(), Some(i64::MIN));
        assert_eq!(number("9223372036854775808").to_i64(), None);
        assert_eq!(number("1e18").to_i64(), Some(1_000_000_000_000_000_000));
        assert_eq!(number("1.50e1").to_i64(), Some(15));
        assert_eq!(number("1.5").to_i64(), None);
        assert_eq!(number("1e999999999999999999999").to_i64(), None);
        assert!(!number("9007199254740992").is_beyond_float8());
        assert!(number("9007199254740993").is_beyond_float8());
        assert!(number("-9007199254740993").is_beyond_float8());
        assert!(number("1e300").is_beyond_float8());
        assert!(!number("9007199254740993.5").is_beyond_float8());
    }

    #[test]
    fn scaling_rounds_half_away_from_zero() {
        for (text, scale, expected) in [
            ("1.005", 2, Some(101)),
            ("-1.005", 2, Some(-101)),
            ("1.0049", 2, Some(100)),
            ("0.5", 0, Some(1)),
            ("-0.5", 0, Some(-1)),
            ("0.05", 0, Some(0)),
            ("0.0005", 2, Some(0)),
            ("12", 3, Some(12_000)),
            ("1e37", 0, Some(10_i128.pow(37))),
            ("1e38", 0, None),
            ("1e30", 8, None),
            (
                "99999999999999999999999999999999999999",
                0,
                Some(10_i128.pow(38) - 1),
            ),
            ("0.1e-400000", 2, Some(0)),
        ] {
            assert_eq!(number(text).scaled(scale), expected, "{text}");
        }
    }

    #[test]
    fn floats_never_become_another_whole_number_or_infinity() {
        for (text, expected) in [
            ("0.1", Some(0.1)),
            ("-0", Some(0.0)),
            ("1e300", Some(1e300)),
            ("9007199254740992", Some(9007199254740992.0)),
            ("9007199254740993", None),
            ("9007199254740994", Some(9007199254740994.0)),
            ("1e309", None),
            ("1e-400", None),
            ("0.12345678901234567890", Some(0.123_456_789_012_345_68)),
        ] {
            assert_eq!(number(text).to_f64(), expected, "{text}");
        }
        assert!(number("-0").to_f64().is_some_and(f64::is_sign_positive));
        assert_eq!(number("1e39").to_f32(), None);
        assert_eq!(number("16777217").to_f32(), Some(16_777_216.0));
    }

    #[test]
    fn exponents_beyond_all_limits_are_one() {
        for text in ["4474.099e4294967298", "-1e99999999999999999999"] {
            let (mut once, mut twice) = (String::new(), String::new());
            number(text).write(&mut once);
            number(&once).write(&mut twice);
            assert_eq!(once, twice);
        }
        let mut small = String::new();
        number("0.0012e-4294967294").write(&mut small);
        assert_eq!(small, "1.2e-4294967295");
    }

    #[test]
    fn limits_of_numeric() {
        for text in ["1e131071", "0e99999", "1e-16383", "12345678901234567890"] {
            assert!(number(text).fits_numeric(), "{text}");
        }
        for text in [
            "1e131072",
            "1e-16384",
            "0e-20000",
            "1e2000000000",
            "0e2000000000",
            "10e131071",
        ] {
            assert!(!number(text).fits_numeric(), "{text}");
        }
    }
}
