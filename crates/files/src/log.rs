//! What is told about values that did not fit: samples, and exact counts by field and day.

use std::collections::BTreeMap;

use rakam_event::batch::{InvalidCount, InvalidValue};
use rakam_event::json;
use rakam_event::time::MICROS_PER_DAY;

/// The log keeps so much of a value,
const SAMPLE_BYTES: usize = 256;
/// and so many values of one field and call of [`Log::take`]. All are counted.
const SAMPLES_PER_FIELD: u64 = 20;

#[derive(Debug, Clone, Default)]
pub struct Log {
    samples: Vec<InvalidValue>,
    counts: BTreeMap<(String, i32), u64>,
}

/// One value to be told about.
pub struct Entry<'a> {
    pub field: &'a str,
    pub ty: &'a str,
    /// Raw JSON.
    pub raw: &'a str,
    pub error: &'a str,
    pub event_id: Option<&'a str>,
    pub received_at_us: i64,
}

impl Log {
    pub fn add(&mut self, entry: &Entry<'_>) {
        let day = entry.received_at_us.div_euclid(MICROS_PER_DAY) as i32;
        let n = self
            .counts
            .entry((entry.field.to_owned(), day))
            .or_default();
        *n += 1;
        if *n > SAMPLES_PER_FIELD {
            return;
        }
        let text = json::string(entry.raw).unwrap_or(std::borrow::Cow::Borrowed(entry.raw));
        self.samples.push(InvalidValue {
            field: entry.field.to_owned(),
            ty: entry.ty.to_owned(),
            value: text[..text.floor_char_boundary(SAMPLE_BYTES)].to_owned(),
            error: entry.error.to_owned(),
            event_id: entry.event_id.map(str::to_owned),
            received_at_us: entry.received_at_us,
        });
    }

    /// Takes over what a batch of events has logged.
    pub fn extend(&mut self, samples: Vec<InvalidValue>, counts: Vec<InvalidCount>) {
        self.samples.extend(samples);
        for count in counts {
            *self.counts.entry((count.field, count.day)).or_default() += count.n;
        }
    }

    /// Samples, and counts in their order.
    pub fn take(&mut self) -> (Vec<InvalidValue>, Vec<InvalidCount>) {
        let counts = std::mem::take(&mut self.counts)
            .into_iter()
            .map(|((field, day), n)| InvalidCount { field, day, n })
            .collect();
        (std::mem::take(&mut self.samples), counts)
    }
}
