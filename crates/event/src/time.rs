//! Dates and times as text and as numbers, in UTC, years 0001 to 9999.

use std::fmt::Write;

use crate::json::{self, Kind};
use crate::number::{Number, short_whole};

pub const MICROS_PER_DAY: i64 = 86_400_000_000;
/// 0001-01-01T00:00:00Z.
pub const MIN_TIME_US: i64 = days_from_civil(1, 1, 1) * MICROS_PER_DAY;
/// 9999-12-31T23:59:59.999999Z.
pub const MAX_TIME_US: i64 = days_from_civil(10_000, 1, 1) * MICROS_PER_DAY - 1;
/// Postgres takes offsets below 16 hours.
const MAX_OFFSET_HOURS: i64 = 15;

/// Days from 1970-01-01 to a day of the proleptic Gregorian calendar
/// (Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms").
pub const fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let month_from_march = (month + 9) % 12;
    let day_of_year = (153 * month_from_march + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

/// The day (year, month, day) so many days after 1970-01-01.
pub const fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = year_of_era + era * 400 + if month <= 2 { 1 } else { 0 };
    (year, month, day)
}

/// `YYYY-MM-DD` of a real day, as days since 1970-01-01.
pub fn exact_date(text: &str) -> Option<i32> {
    let mut reader = Reader(text.as_bytes());
    let days = reader.date()?;
    reader.0.is_empty().then_some(days as i32)
}

/// `YYYY-MM-DD[T ]HH:MM[:SS[.f…]][Z|±HH[:MM]]` of a real day, as microseconds since 1970 UTC. As in Postgres,
/// 24:00 is the next midnight and second 60, without a fraction, the next minute.
pub fn exact_timestamp(text: &str) -> Option<i64> {
    let mut reader = Reader(text.as_bytes());
    let days = reader.date()?;
    reader.time_of(days, Spelling::Exact)
}

/// What a timestamp column takes: [`exact_timestamp`], a date (midnight UTC), and the other spellings of
/// ISO 8601 that Postgres prints or reads: outer blanks, lower-case letters, `±HHMM`, a comma in the fraction.
pub fn timestamp(text: &str) -> Option<i64> {
    let text = text.trim_ascii();
    let mut reader = Reader(text.as_bytes());
    let days = reader.date()?;
    if reader.0.is_empty() {
        return Some(days * MICROS_PER_DAY);
    }
    reader.time_of(days, Spelling::Any)
}

/// The time that a raw JSON value of `_time` means: text as [`timestamp`], or milliseconds since 1970 as a
/// number or numeric text.
pub fn event_time(raw: &str) -> Option<i64> {
    match json::kind(raw) {
        Kind::Number => milliseconds(raw),
        Kind::String => {
            let text = json::string(raw)?;
            timestamp(&text).or_else(|| milliseconds(&text))
        }
        _ => None,
    }
}

fn milliseconds(text: &str) -> Option<i64> {
    let micros = match short_whole(text, 15) {
        Some(millis) => millis * 1_000,
        None => Number::parse(text)?.scaled(3)?.try_into().ok()?,
    };
    (MIN_TIME_US..=MAX_TIME_US)
        .contains(&micros)
        .then_some(micros)
}

/// `YYYY-MM-DD`.
pub fn write_date(days: i64, out: &mut String) {
    let (year, month, day) = civil_from_days(days);
    // Writing into a String cannot fail.
    let _ = write!(out, "{year:04}-{month:02}-{day:02}");
}

/// As Postgres prints a timestamptz in jsonb under UTC: `2020-01-02T03:04:05.1234+00:00`.
pub fn write_timestamp(micros: i64, out: &mut String) {
    write_date(micros.div_euclid(MICROS_PER_DAY), out);
    let of_day = micros.rem_euclid(MICROS_PER_DAY);
    let (seconds, mut fraction) = (of_day / 1_000_000, of_day % 1_000_000);
    let (hour, minute, second) = (seconds / 3_600, seconds / 60 % 60, seconds % 60);
    let _ = write!(out, "T{hour:02}:{minute:02}:{second:02}");
    if fraction > 0 {
        let mut width = 6;
        while fraction % 10 == 0 {
            fraction /= 10;
            width -= 1;
        }
        let _ = write!(out, ".{fraction:0width$}");
    }
    out.push_str("+00:00");
}

#[derive(Clone, Copy, PartialEq)]
enum Spelling {
    Exact,
    Any,
}

/// What is left of the text; each method takes its part from the front, or answers None.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take(&mut self, byte: u8) -> bool {
        match self.0 {
            [first, rest @ ..] if *first == byte => {
                self.0 = rest;
                true
            }
            _ => false,
        }
    }

    fn two_digits(&mut self) -> Option<i64> {
        match self.0 {
            [a, b, rest @ ..] if a.is_ascii_digit() && b.is_ascii_digit() => {
                self.0 = rest;
                Some(i64::from(a - b'0') * 10 + i64::from(b - b'0'))
            }
            _ => None,
        }
    }

    /// `YYYY-MM-DD` of a real day, in days since 1970.
    fn date(&mut self) -> Option<i64> {
        let year = self.two_digits()? * 100 + self.two_digits()?;
        if !self.take(b'-') {
            return None;
        }
        let month = self.two_digits()?;
        if !self.take(b'-') {
            return None;
        }
        let day = self.two_digits()?;
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let last = match month {
            1 | 3 | 5 | 7 | 8 | 10 | 12 => 31,
            4 | 6 | 9 | 11 => 30,
            2 if leap => 29,
            2 => 28,
            _ => return None,
        };
        (year > 0 && (1..=last).contains(&day)).then(|| days_from_civil(year, month, day))
    }

    /// What follows the date of a time, to the end of the text, as microseconds since 1970.
    fn time_of(&mut self, days: i64, spelling: Spelling) -> Option<i64> {
        let any = spelling == Spelling::Any;
        if !(self.take(b'T') || self.take(b' ') || any && self.take(b't')) {
            return None;
        }
        let hour = self.two_digits()?;
        if !self.take(b':') {
            return None;
        }
        let minute = self.two_digits()?;
        let (mut second, mut fraction) = (0, 0);
        if self.take(b':') {
            second = self.two_digits()?;
            if self.take(b'.') || any && self.take(b',') {
                fraction = self.fraction()?;
            }
        }
        let past_end = |limit, value, rest| value > limit || value == limit && rest > 0;
        if past_end(24, hour, minute + second + fraction)
            || minute > 59
            || past_end(60, second, fraction)
        {
            return None;
        }
        let offset = self.offset(any)?;
        if !self.0.is_empty() {
            return None;
        }
        let seconds = (hour * 60 + minute) * 60 + second - offset;
        let micros = days * MICROS_PER_DAY + seconds * 1_000_000 + fraction;
        (MIN_TIME_US..=MAX_TIME_US)
            .contains(&micros)
            .then_some(micros)
    }

    /// Digits after the decimal point in microseconds, rounded as Postgres does (`ParseFractionalSecond`:
    /// through a double, ties to even).
    fn fraction(&mut self) -> Option<i64> {
        let end = self
            .0
            .iter()
            .position(|b| !b.is_ascii_digit())
            .unwrap_or(self.0.len());
        let (digits, rest) = self.0.split_at(end);
        self.0 = rest;
        if digits.is_empty() {
            return None;
        }
        if digits.len() <= 6 {
            let read = |n, b: &u8| n * 10 + i64::from(b - b'0');
            let missing = 6 - digits.len() as u32;
            return Some(digits.iter().fold(0, read) * 10_i64.pow(missing));
        }
        let text = format!("0.{}", std::str::from_utf8(digits).ok()?);
        let fraction: f64 = text.parse().ok()?;
        Some((fraction * 1e6).round_ties_even() as i64)
    }

    /// Nothing or `Z` = UTC, `±HH`, `±HH:MM`, in seconds east of UTC.
    fn offset(&mut self, any: bool) -> Option<i64> {
        if any && matches!(self.0, [b' ', b'Z' | b'z' | b'+' | b'-', ..]) {
            self.take(b' ');
        }
        if self.0.is_empty() || self.take(b'Z') || any && self.take(b'z') {
            return Some(0);
        }
        let sign = if self.take(b'+') {
            1
        } else if self.take(b'-') {
            -1
        } else {
            return None;
        };
        let hours = self.two_digits()?;
        let minutes = if self.take(b':') || any && !self.0.is_empty() {
            self.two_digits()?
        } else {
            0
        };
        (hours <= MAX_OFFSET_HOURS && minutes < 60).then_some(sign * (hours * 60 + minutes) * 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(micros: Option<i64>) -> Option<String> {
        let mut out = String::new();
        write_timestamp(micros?, &mut out);
        Some(out)
    }

    #[test]
    fn dates_are_real_days() {
        for (text, days) in [
            ("1970-01-01", Some(0)),
            ("2000-02-29", Some(11_016)),
            ("0001-01-01", Some(-719_162)),
            ("9999-12-31", Some(2_932_896)),
            ("1900-02-29", None),
            ("2023-02-30", None),
            ("2023-13-01", None),
            ("2023-00-01", None),
            ("0000-01-01", None),
            ("2023-1-1", None),
            ("2023-01-01 ", None),
            ("20230101", None),
            ("2023-01-01T00:00", None),
        ] {
            assert_eq!(exact_date(text), days, "{text}");
        }
        for days in (-719_162..2_932_896).step_by(97) {
            let (year, month, day) = civil_from_days(days);
            assert_eq!(days_from_civil(year, month, day), days);
        }
    }

    #[test]
    fn exact_timestamps() {
        for (text, expected) in [
            ("2020-01-02T03:04", Some("2020-01-02T03:04:00+00:00")),
            ("2020-01-02 03:04:05", Some("2020-01-02T03:04:05+00:00")),
            (
                "2020-01-02T03:04:05.5Z",
                Some("2020-01-02T03:04:05.5+00:00"),
            ),
            (
                "2020-01-02T03:04:05.123456Z",
                Some("2020-01-02T03:04:05.123456+00:00"),
            ),
            (
                "2020-01-02T03:04:05.1234567+02",
                Some("2020-01-02T01:04:05.123457+00:00"),
            ),
            (
                "2020-01-02T03:04:59.9999999Z",
                Some("2020-01-02T03:05:00+00:00"),
            ),
            (
                "2020-01-02T03:04:05-05:30",
                Some("2020-01-02T08:34:05+00:00"),
            ),
            (
                "1969-12-31T23:59:59.999Z",
                Some("1969-12-31T23:59:59.999+00:00"),
            ),
            ("2020-01-02T24:00", Some("2020-01-03T00:00:00+00:00")),
            ("2020-01-02T23:59:60", Some("2020-01-03T00:00:00+00:00")),
            (
                "2020-01-02T24:00:00.0000001",
                Some("2020-01-03T00:00:00+00:00"),
            ),
            (
                "2020-01-02T03:04:05.1234565",
                Some("2020-01-02T03:04:05.123456+00:00"),
            ),
            ("2020-01-02T23:59:60.5", None),
            ("9999-12-31T23:59:59.9999999", None),
            ("2020-01-02T24:01", None),
            ("2020-01-02T03:60", None),
            ("2020-01-02T03:04:61", None),
            ("2020-01-02T03", None),
            ("2020-01-02T03:04:", None),
            ("2020-01-02T03:04:05.", None),
            ("2020-01-02T03:04:05z", None),
            ("2020-01-02t03:04:05", None),
            ("2020-01-02T03:04:05+0200", None),
            ("2020-01-02T03:04:05+16", None),
            ("2020-01-02T03:04:05 +02", None),
            ("2020-01-02  03:04:05", None),
            ("2020-02-30T03:04:05", None),
            ("2020-01-02", None),
            ("0001-01-01T00:00+01", None),
            ("9999-12-31T24:00", None),
            ("2020-01-02T03:04:05Zx", None),
            ("", None),
        ] {
            assert_eq!(
                printed(exact_timestamp(text)).as_deref(),
                expected,
                "{text}"
            );
        }
    }

    #[test]
    fn event_times() {
        for (raw, expected) in [
            (r#""2020-01-02""#, Some("2020-01-02T00:00:00+00:00")),
            (
                r#""2020-01-02t03:04:05z""#,
                Some("2020-01-02T03:04:05+00:00"),
            ),
            (
                r#"" 2020-01-02 03:04:05.25 +0530 ""#,
                Some("2020-01-01T21:34:05.25+00:00"),
            ),
            (
                r#""2020-01-02 03:04:05+00""#,
                Some("2020-01-02T03:04:05+00:00"),
            ),
            ("1577934245123", Some("2020-01-02T03:04:05.123+00:00")),
            (
                "1577934245123.4567",
                Some("2020-01-02T03:04:05.123457+00:00"),
            ),
            ("1.577934245123e12", Some("2020-01-02T03:04:05.123+00:00")),
            (r#""1577934245123""#, Some("2020-01-02T03:04:05.123+00:00")),
            ("-1", Some("1969-12-31T23:59:59.999+00:00")),
            ("0", Some("1970-01-01T00:00:00+00:00")),
            ("1e30", None),
            ("1e15", None),
            (r#""yesterday""#, None),
            (r#""""#, None),
            ("true", None),
            ("[1]", None),
        ] {
            assert_eq!(printed(event_time(raw)).as_deref(), expected, "{raw}");
        }
    }
}
