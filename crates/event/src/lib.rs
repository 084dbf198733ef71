//! What an event is: names, types, JSON to Arrow, coercion and schema evolution.
//!
//! Pure code: no server, no clock, no I/O. Time and limits are passed in. Start reading at [`schema`],
//! then [`entry`] (what collect accepts), [`discovery`] (what the registry learns from it) and [`batch`],
//! the road of an event's bytes into columns; [`avro`] is the other form of events; [`extra`] reads rows that were stored before a field existed.
#![forbid(unsafe_code)]

pub mod avro;
pub mod batch;
pub mod coerce;
pub mod column;
pub mod discovery;
pub mod entry;
pub mod error;
pub mod extra;
pub mod infer;
pub mod json;
pub mod jsonb;
mod keys;
pub mod names;
pub mod net;
pub mod number;
pub mod print;
#[cfg(any(test, feature = "fuzzing"))]
pub mod roads;
mod scan;
pub mod schema;
#[cfg(any(test, feature = "fuzzing"))]
pub mod testing;
pub mod time;
pub mod types;
