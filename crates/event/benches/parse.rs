//! What an event costs in this crate, by stage: nanoseconds of one thread, the best of many short runs.
//!
//!     cargo bench -p rakam-event
//!
//! The events are shaped like the flights of `benches/sql`: 21 properties, mostly small numbers.

use std::fmt::Write;
use std::hint::black_box;
use std::time::{Duration, Instant};

use rakam_event::batch::{BatchBuilder, EventStamp, Layout};
use rakam_event::discovery::Discovery;
use rakam_event::entry::{self, Limits};
use rakam_event::schema::{FIRST_USER_FIELD_ID, Field, Schema};

const EVENTS: usize = 500;
const RUNS: usize = 400;

/// `blank` is what follows commas and colons: a blank as most libraries write it, or nothing.
fn flight(n: usize, blank: &str, escapes: bool) -> String {
    let (hour, minute) = (5 + n % 19, n * 7 % 60);
    let delay = (n * 31 % 97) as i64 - 12;
    let arrived = match n % 40 {
        0 => "null".to_owned(),
        _ => (hour * 100 + minute + 230).to_string(),
    };
    let tail = if escapes {
        format!("N\\u00e9{}\\n", 100 + n * 13 % 900)
    } else {
        format!("N{}UA", 100 + n * 13 % 900)
    };
    let pairs = [
        (
            "_time",
            format!(
                "\"2013-{:02}-{:02}T{hour:02}:{minute:02}:00Z\"",
                n % 12 + 1,
                n % 28 + 1
            ),
        ),
        ("_user", format!("\"{tail}\"")),
        ("year", "2013".to_owned()),
        ("month", (n % 12 + 1).to_string()),
        ("day", (n % 28 + 1).to_string()),
        ("dep_time", (hour * 100 + minute).to_string()),
        ("sched_dep_time", (hour * 100).to_string()),
        ("dep_delay", delay.to_string()),
        ("arr_time", arrived.clone()),
        ("sched_arr_time", (hour * 100 + 219).to_string()),
        ("arr_delay", (delay - 7).to_string()),
        (
            "carrier",
            format!("\"{}\"", ["UA", "AA", "B6", "DL"][n % 4]),
        ),
        ("flight", (n * 17 % 6000).to_string()),
        ("tailnum", format!("\"{tail}\"")),
        ("origin", format!("\"{}\"", ["EWR", "LGA", "JFK"][n % 3])),
        (
            "dest",
            format!("\"{}\"", ["IAH", "MIA", "BQN", "ATL", "ORD"][n % 5]),
        ),
        ("air_time", (n % 300 + 40).to_string()),
        ("distance", (n * 11 % 2500 + 90).to_string()),
        ("hour", hour.to_string()),
        ("minute", minute.to_string()),
        (
            "time_hour",
            format!(
                "\"2013-{:02}-{:02}T{hour:02}:00:00Z\"",
                n % 12 + 1,
                n % 28 + 1
            ),
        ),
    ];
    let mut out = String::from("{");
    for (i, (key, value)) in pairs.iter().enumerate() {
        let comma = if i > 0 { "," } else { "" };
        let before = if i > 0 { blank } else { "" };
        // Writing into a String cannot fail.
        let _ = write!(out, "{comma}{before}\"{key}\":{blank}{value}");
    }
    out + "}"
}

fn best(mut run: impl FnMut()) -> Duration {
    let mut best = Duration::MAX;
    for _ in 0..RUNS {
        let began = Instant::now();
        run();
        best = best.min(began.elapsed());
    }
    best
}

fn report(what: &str, bytes: usize, took: Duration) {
    let per_event = took.as_nanos() as f64 / EVENTS as f64;
    let speed = bytes as f64 / took.as_secs_f64() / 1e6;
    println!("{what:<44} {per_event:8.0} ns/event {speed:8.0} MB/s");
}

fn main() {
    let limits = Limits::default();
    let stamp = EventStamp {
        received_at_us: 1_700_000_000_000_000,
        shift_us: 0,
        time_min_us: 0,
        time_max_us: 1_800_000_000_000_000,
        xid: 42,
    };
    for (name, blank, escapes) in [
        ("blanks", " ", false),
        ("compact", "", false),
        ("escapes", " ", true),
    ] {
        let events: Vec<String> = (0..EVENTS).map(|n| flight(n, blank, escapes)).collect();
        let bytes: usize = events.iter().map(String::len).sum();
        println!("{name}: {} bytes an event", bytes / EVENTS);
        let items: Vec<String> = events
            .iter()
            .map(|e| {
                format!("{{\"collection\":{blank}\"departure\",{blank}\"properties\":{blank}{e}}}")
            })
            .collect();
        let array = format!("[{}]", items.join(&format!(",{blank}")));

        let took = best(|| {
            black_box(entry::split_batch(black_box(&array), &limits)).ok();
        });
        report("  split_batch", array.len(), took);
        let took = best(|| {
            for event in &events {
                black_box(entry::check_event(black_box(event), &limits)).ok();
            }
        });
        report("  check_event", bytes, took);

        let mut discovery = Discovery::new(&Schema::new(1, Vec::new()), 500);
        events
            .iter()
            .for_each(|event| discovery.observe(event, 1, 1));
        let fields = discovery
            .new_fields()
            .into_iter()
            .enumerate()
            .map(|(at, (name, ty))| Field {
                id: FIRST_USER_FIELD_ID + at as i32,
                name,
                ty,
                added_version: 1,
                column_ready: true,
            })
            .collect();
        let schema = Schema::new(2, fields);
        let took = best(|| {
            let mut discovery = Discovery::new(&schema, 500);
            events
                .iter()
                .for_each(|event| discovery.observe(black_box(event), 1, 1));
            black_box(discovery.new_fields());
        });
        report("  discovery of nothing new", bytes, took);
        let took = best(|| {
            let Ok(mut builder) = BatchBuilder::new(&schema, Layout::Stored, &limits) else {
                return;
            };
            for event in &events {
                black_box(builder.push(black_box(event), &stamp)).ok();
            }
            black_box(builder.finish()).ok();
        });
        report("  into columns", bytes, took);
    }
}
