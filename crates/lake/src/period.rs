//! Which period a data file covers (SPEC §5), and what the file is called.
//!
//! A day with enough events has a file of its own; the other days of a month share one if together they have enough;
//! what is left of a year shares one, however small.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use twox_hash::XxHash64;
use uuid::Uuid;

use crate::error::LakeError;

pub const MICROS_PER_DAY: i64 = 86_400_000_000;
/// A path component longer than this is replaced by its beginning and its hash.
const MAX_COMPONENT: usize = 200;

/// The length of a file's period; days are UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Period {
    Day,
    Month,
    Year,
}

impl Period {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Day => "day",
            Self::Month => "month",
            Self::Year => "year",
        }
    }

    /// The period of this length around a day: its first and last day.
    pub fn around(self, day: i32) -> (i32, i32) {
        let (year, month, _) = civil(day);
        let (first, end) = match self {
            Self::Day => return (day, day),
            Self::Month if month == 12 => (days(year, 12, 1), days(year + 1, 1, 1)),
            Self::Month => (days(year, month, 1), days(year, month + 1, 1)),
            Self::Year => (days(year, 1, 1), days(year + 1, 1, 1)),
        };
        // Only the periods at the two ends of the numbers are cut; no event is there.
        let clamp = |day: i64| day.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32;
        (clamp(first), clamp(end - 1))
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Period {
    type Err = LakeError;

    fn from_str(name: &str) -> Result<Self, LakeError> {
        [Self::Day, Self::Month, Self::Year]
            .into_iter()
            .find(|period| period.as_str() == name)
            .ok_or_else(|| LakeError::corrupt("period", format!("unknown name \"{name}\"")))
    }
}

/// A file to be written. The days are those of the whole period, both inclusive: a month file may lack some of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeriodFile {
    pub period: Period,
    pub first_day: i32,
    pub last_day: i32,
}

impl PeriodFile {
    fn of(period: Period, day: i32) -> Self {
        let (first_day, last_day) = period.around(day);
        Self {
            period,
            first_day,
            last_day,
        }
    }
}

/// The files of a flush or a compaction, by first day and then from day to year, and the file of each day.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    files: Vec<PeriodFile>,
    by_day: BTreeMap<i32, usize>,
}

impl Plan {
    /// One file for every day of a period.
    pub fn whole(period: Period, day: i32) -> Self {
        let file = PeriodFile::of(period, day);
        Self {
            files: vec![file],
            by_day: (file.first_day..=file.last_day)
                .map(|day| (day, 0))
                .collect(),
        }
    }

    pub fn files(&self) -> &[PeriodFile] {
        &self.files
    }

    /// The file an event of this day goes to; `None` for a day that was not planned.
    pub fn assign(&self, day: i32) -> Option<usize> {
        self.by_day.get(&day).copied()
    }
}

/// The UTC day of a time in microseconds since 1970.
pub fn day_of(time_us: i64) -> i32 {
    // The quotient of an i64 by a day's microseconds always fits.
    time_us.div_euclid(MICROS_PER_DAY) as i32
}

/// The finest files that are worth it, for events counted by day since 1970.
pub fn plan(counts_per_day: &BTreeMap<i32, u64>, min_file_events: u64) -> Plan {
    plan_from((Period::Day, Period::Year), counts_per_day, min_file_events)
}

/// As [`plan`] for days within one period: what is not enough for a finer one goes to that period.
pub fn plan_inside(
    coarsest: Period,
    counts_per_day: &BTreeMap<i32, u64>,
    min_file_events: u64,
) -> Plan {
    plan_from((Period::Day, coarsest), counts_per_day, min_file_events)
}

/// As [`plan`], but nothing finer than `finest`, and coarser still while there would be more than `most` files of a
/// period finer than a year.
pub fn plan_within(
    finest: Period,
    counts_per_day: &BTreeMap<i32, u64>,
    min_file_events: u64,
    most: usize,
) -> Plan {
    let mut plan = plan_from((finest, Period::Year), counts_per_day, min_file_events);
    for coarser in [Period::Month, Period::Year] {
        if plan.files.len() > most && finest < coarser {
            plan = plan_from((coarser, Period::Year), counts_per_day, min_file_events);
        }
    }
    plan
}

/// With periods between the finest and the coarsest given.
fn plan_from(
    (finest, coarsest): (Period, Period),
    counts_per_day: &BTreeMap<i32, u64>,
    min_file_events: u64,
) -> Plan {
    let rest = |period: Period, days: &[(i32, u64)]| {
        let mut sums = BTreeMap::<i32, u64>::new();
        for &(day, n) in days {
            let sum = sums.entry(period.around(day).0).or_default();
            *sum = sum.saturating_add(n);
        }
        sums
    };

    let mut of_day = BTreeMap::<i32, PeriodFile>::new();
    let mut small = Vec::new();
    for (&day, &n) in counts_per_day.iter().filter(|&(_, &n)| n > 0) {
        if coarsest == Period::Day || finest == Period::Day && n >= min_file_events {
            of_day.insert(day, PeriodFile::of(Period::Day, day));
        } else {
            small.push((day, n));
        }
    }
    let months = rest(Period::Month, &small);
    for (day, _) in small {
        let month = PeriodFile::of(Period::Month, day);
        let enough = coarsest == Period::Month
            || finest <= Period::Month
                && months
                    .get(&month.first_day)
                    .is_some_and(|&n| n >= min_file_events);
        let file = if enough {
            month
        } else {
            PeriodFile::of(Period::Year, day)
        };
        of_day.insert(day, file);
    }

    let mut files: Vec<PeriodFile> = of_day.values().copied().collect();
    files.sort_by_key(|file| (file.first_day, file.period));
    files.dedup();
    let position: BTreeMap<_, _> = files
        .iter()
        .enumerate()
        .map(|(i, file)| ((file.first_day, file.period), i))
        .collect();
    let by_day = of_day
        .iter()
        .map(|(&day, file)| (day, position[&(file.first_day, file.period)]))
        .collect();
    Plan { files, by_day }
}

/// The name of a data file below the storage's root, for instance `acme/pageview/2024/2024-05/2024-05-17/<id>.parquet`.
pub fn object_path(
    project: &str,
    collection: &str,
    period: Period,
    first_day: i32,
    id: Uuid,
) -> String {
    let (year, month, day) = civil(first_day);
    let mut path = format!("{}/{}/{year:04}", component(project), component(collection));
    if period != Period::Year {
        path += &format!("/{year:04}-{month:02}");
    }
    if period == Period::Day {
        path += &format!("/{year:04}-{month:02}-{day:02}");
    }
    path + &format!("/{id}.parquet")
}

/// The id in the name of a data file; None: it is the name of something else.
pub fn object_id(path: &str) -> Option<Uuid> {
    let name = path.rsplit('/').next()?.strip_suffix(".parquet")?;
    // In the one spelling that [`object_path`] gives it.
    Uuid::try_parse(name)
        .ok()
        .filter(|id| id.hyphenated().to_string() == name)
}

/// A name as a path component: every byte outside `[A-Za-z0-9_-]` becomes `!` and two hex digits.
///
/// Not `%`: readers disagree on whether a path with `%` is still to be decoded, and object stores advise against it;
/// `!` means nothing to a file system, a bucket or a URL.
pub fn component(name: &str) -> String {
    let mut encoded = String::with_capacity(name.len());
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-' {
            encoded.push(char::from(byte));
        } else {
            encoded += &format!("!{byte:02X}");
        }
    }
    if encoded.is_empty() {
        // No encoded name begins so: `!` is followed by hex digits.
        return "!empty".to_owned();
    }
    if encoded.len() > MAX_COMPONENT {
        // No other encoded name ends so: no hex digit is a small h.
        let hash = XxHash64::oneshot(0, name.as_bytes());
        encoded.truncate(MAX_COMPONENT - 18);
        encoded += &format!("!h{hash:016x}");
    }
    encoded
}

/// Year, month and day of a day since 1970 in the proleptic Gregorian calendar; total, unlike chrono's.
fn civil(day: i32) -> (i64, i64, i64) {
    // Eras of 400 years that begin on 1 March: the leap day is the last of its year.
    let z = i64::from(day) + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + i64::from(month <= 2);
    (year, month, doy - (153 * mp + 2) / 5 + 1)
}

/// The inverse of [`civil`].
fn days(year: i64, month: i64, day: i64) -> i64 {
    let y = if month <= 2 { year - 1 } else { year };
    let era = y.div_euclid(400);
    let yoe = y.rem_euclid(400);
    let mp = (month + 9) % 12;
    let doe = yoe * 365 + yoe / 4 - yoe / 100 + (153 * mp + 2) / 5 + day - 1;
    era * 146_097 + doe - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rng;

    fn date(text: &str) -> i32 {
        let mut parts = text.split('-').map(|p| p.parse::<i64>().unwrap());
        days(
            parts.next().unwrap(),
            parts.next().unwrap(),
            parts.next().unwrap(),
        ) as i32
    }

    /// Days with counts, the limit, and the files as `period first..last`.
    fn check(counts: &[(&str, u64)], min: u64, expect: &[&str]) {
        let counts = counts.iter().map(|&(d, n)| (date(d), n)).collect();
        let plan = plan(&counts, min);
        let show = |day: i32| {
            let (y, m, d) = civil(day);
            format!("{y:04}-{m:02}-{d:02}")
        };
        let got: Vec<String> = plan
            .files()
            .iter()
            .map(|f| format!("{} {}..{}", f.period, show(f.first_day), show(f.last_day)))
            .collect();
        assert_eq!(got, expect);
        for (&day, &n) in &counts {
            match plan.assign(day) {
                Some(i) => assert!(
                    n > 0 && plan.files()[i].first_day <= day && day <= plan.files()[i].last_day
                ),
                None => assert_eq!(n, 0),
            }
        }
    }

    #[test]
    fn the_finest_period_that_is_worth_a_file() {
        check(&[], 10, &[]);
        check(&[("2024-05-17", 1)], 10, &["year 2024-01-01..2024-12-31"]);
        check(&[("2024-05-17", 10)], 10, &["day 2024-05-17..2024-05-17"]);
        check(
            &[("2024-05-17", 5), ("2024-05-18", 5)],
            10,
            &["month 2024-05-01..2024-05-31"],
        );
        // A large day does not lift the small ones of its month.
        check(
            &[("2024-05-17", 5), ("2024-05-18", 50)],
            10,
            &["year 2024-01-01..2024-12-31", "day 2024-05-18..2024-05-18"],
        );
        check(
            &[
                ("2024-01-01", 10),
                ("2024-01-02", 9),
                ("2024-01-03", 1),
                ("2024-02-29", 1),
                ("2024-12-31", 1),
            ],
            10,
            &[
                "day 2024-01-01..2024-01-01",
                "month 2024-01-01..2024-01-31",
                "year 2024-01-01..2024-12-31",
            ],
        );
        check(&[("2024-05-17", 0)], 10, &[]);
        check(&[("2023-02-28", 1)], 0, &["day 2023-02-28..2023-02-28"]);
    }

    #[test]
    fn a_thousand_a_day_is_a_file_a_month() {
        let counts = (date("2022-01-01")..=date("2024-12-31"))
            .map(|d| (d, 1000))
            .collect();
        let plan = plan(&counts, 10_000);
        assert_eq!(plan.files().len(), 36);
        assert!(plan.files().iter().all(|f| f.period == Period::Month));
    }

    #[test]
    fn a_bound_makes_periods_coarser() {
        let counts = (date("2022-01-01")..=date("2024-12-31"))
            .map(|d| (d, 12_000))
            .collect();
        let files = |finest, most| plan_within(finest, &counts, 10_000, most).files().to_vec();
        assert_eq!(files(Period::Day, 2000).len(), 1096);
        assert_eq!(files(Period::Month, 2000).len(), 36);
        assert_eq!(files(Period::Day, 40).len(), 36);
        assert_eq!(files(Period::Day, 35).len(), 3);
        assert_eq!(files(Period::Month, 2), files(Period::Year, 2000));
        // Years are the coarsest there is.
        assert_eq!(files(Period::Day, 1).len(), 3);
    }

    #[test]
    fn years_of_one_event_are_a_file_each() {
        let counts: BTreeMap<i32, u64> = (1..=9999).map(|y| (days(y, 6, 1) as i32, 1)).collect();
        let plan = plan(&counts, 10_000);
        assert_eq!(plan.files().len(), 9999);
        assert!(plan.files().iter().all(|f| f.period == Period::Year));
    }

    #[test]
    fn dates_agree_with_chrono() {
        let mut rng = Rng::new(1);
        let epoch = chrono::NaiveDate::from_ymd_opt(1970, 1, 1).unwrap();
        for _ in 0..20_000 {
            let day = rng.between(-719_162, 2_932_896) as i32;
            let (y, m, d) = civil(day);
            let expect = epoch + chrono::Duration::days(i64::from(day));
            assert_eq!(format!("{y:04}-{m:02}-{d:02}"), expect.to_string());
            assert_eq!(days(y, m, d), i64::from(day));
        }
        for day in [i32::MIN, i32::MAX] {
            let (y, m, d) = civil(day);
            assert_eq!(days(y, m, d), i64::from(day));
            let (first, last) = Period::Year.around(day);
            assert!(first <= day && day <= last);
        }
    }

    #[test]
    fn days_of_times() {
        assert_eq!(day_of(0), 0);
        assert_eq!(day_of(-1), -1);
        assert_eq!(day_of(MICROS_PER_DAY - 1), 0);
        assert_eq!(day_of(MICROS_PER_DAY), 1);
    }

    #[test]
    fn names_are_safe() {
        let id = Uuid::nil();
        let day = date("2024-05-17");
        let path = |p, c, period| object_path(p, c, period, day, id);
        assert_eq!(
            path("acme", "pageview", Period::Day),
            format!("acme/pageview/2024/2024-05/2024-05-17/{id}.parquet")
        );
        assert_eq!(
            path("acme", "page-view", Period::Month),
            format!("acme/page-view/2024/2024-05/{id}.parquet")
        );
        assert_eq!(
            path("a/b", "..", Period::Year),
            format!("a!2Fb/!2E!2E/2024/{id}.parquet")
        );
        assert_eq!(component("50% ü!"), "50!25!20!C3!BC!21");
        assert_eq!(component(""), "!empty");
        let long = [component(&"ä".repeat(60)), component(&"ä".repeat(61))];
        assert!(long.iter().all(|c| c.len() == MAX_COMPONENT) && long[0] != long[1]);
        assert_eq!(component(&"a".repeat(MAX_COMPONENT)).len(), MAX_COMPONENT);
        for name in ["50% ü!", "..", ".", "", &"ä".repeat(61), "a\\b\0"] {
            let path = path("p", name, Period::Day);
            // object_store neither refuses nor rewrites it.
            assert_eq!(object_store::path::Path::from(path.as_str()).as_ref(), path);
            assert!(object_store::path::Path::parse(&path).is_ok());
        }
    }
}
