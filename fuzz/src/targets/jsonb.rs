//! Arbitrary bytes as Postgres' jsonb.
use rakam_event::entry::{Limits, split_batch, split_events};
use rakam_event::jsonb;

pub fn run(bytes: &[u8]) {
    let Some(text) = jsonb::to_text(bytes) else {
        return;
    };
    // A text that is given is JSON, or at least nothing that panics on the way to an event.
    let _ = rakam_event::roads::event(&text);
    if let Some(events) = jsonb::events::read(bytes, Vec::new()) {
        assert_eq!(events.text, text);
        let limits = Limits::default();
        if let Ok(batch) = split_batch(&text, &limits) {
            assert_eq!(split_events(&events, &limits), Ok(batch));
        }
    }
}

/// `{"a": 1}`, `[-12.50, "é", true, null]` and `"x"`, as the server writes them on a little-endian machine.
pub fn seeds() -> Vec<Vec<u8>> {
    let words = |words: &[u32]| {
        words
            .iter()
            .flat_map(|w| w.to_ne_bytes())
            .collect::<Vec<u8>>()
    };
    let mut object = words(&[0x2000_0001, 0x8000_0001, 0x1000_000b]);
    object.extend(b"a\0\0\0");
    object.extend(words(&[8 << 2, 0x0001_8000]));
    let mut array = words(&[
        0x4000_0004,
        0x9000_000a,
        0x0000_0002,
        0x3000_0000,
        0x4000_0000,
    ]);
    array.extend(words(&[10 << 2, 0x000c_a100, 0x0000_1388]));
    array.truncate(30);
    array.extend("é".as_bytes());
    let mut scalar = words(&[0x5000_0001, 0x8000_0001]);
    scalar.extend(b"x");
    vec![object, array, scalar]
}
