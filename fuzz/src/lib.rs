//! What the fuzz targets share: how one begins, and the envelope of stored bytes.
//!
//! Seeds are made at run time, from the generators that the crates' own tests use, so that they are always of the present
//! formats: a target writes them into the folder that `RAKAM_FUZZ_SEEDS` names before libFuzzer reads it.

use std::cell::RefCell;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::{env, fs, process};

use bytes::Bytes;
use twox_hash::XxHash64;

pub mod targets;

thread_local! {
    static LAST_PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// To be called once, before the first input: writes the seeds, and lets decoders of others panic where our code is
/// prepared for it. A panic of our own code ends the run wherever it is.
pub fn begin(seeds: impl IntoIterator<Item = Vec<u8>>) {
    if let Some(folder) = env::var_os("RAKAM_FUZZ_SEEDS") {
        for (n, seed) in seeds.into_iter().enumerate() {
            let path = Path::new(&folder).join(format!("seed-{n:04}"));
            fs::write(&path, seed).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        }
    }
    let aborting = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        let foreign = |file: &str| file.contains("/registry/") || file.contains("/rustc/");
        if info.location().is_some_and(|at| foreign(at.file())) {
            LAST_PANIC.set(info.to_string());
        } else {
            aborting(info);
        }
    }));
}

/// Runs a target on an input. A panic that nobody caught on its way here is a crash.
pub fn guarded(target: targets::Target, input: &[u8]) {
    if panic::catch_unwind(AssertUnwindSafe(|| target(input))).is_err() {
        eprintln!("{}", LAST_PANIC.take());
        process::abort();
    }
}

/// The bytes as if an encoder had written them: magic, checksum, payload.
pub fn seal(magic: &[u8; 4], payload: &[u8]) -> Bytes {
    [magic, &checksum(payload)[..], payload].concat().into()
}

/// As it lies before what it is of.
pub fn checksum(payload: &[u8]) -> [u8; 8] {
    XxHash64::oneshot(0, payload).to_le_bytes()
}

/// The first `N` bytes of an input, which choose what is done with the rest; nothing is done with a shorter one.
pub fn split<const N: usize>(input: &[u8]) -> Option<([u8; N], &[u8])> {
    input
        .split_first_chunk()
        .map(|(choice, rest)| (*choice, rest))
}

/// A seed: what chooses, and the rest.
pub fn seed(choice: &[u8], rest: &[u8]) -> Vec<u8> {
    [choice, rest].concat()
}
