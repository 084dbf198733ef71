//! What is fuzzed: each target takes any bytes, and has seeds to begin with.

pub mod avro;
pub mod event;
pub mod files;
pub mod jsonb;
pub mod stored;
pub mod text;

/// A target: what it does with an input.
pub type Target = fn(&[u8]);

/// Every target by its name, with its seeds.
pub const ALL: [(&str, Target, fn() -> Vec<Vec<u8>>); 6] = [
    ("event", event::run, event::seeds),
    ("jsonb", jsonb::run, jsonb::seeds),
    ("files", files::run, files::seeds),
    ("avro", avro::run, avro::seeds),
    ("stored", stored::run, stored::seeds),
    ("text", text::run, text::seeds),
];
