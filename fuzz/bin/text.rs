#![no_main]

use libfuzzer_sys::fuzz_target;
use rakam_fuzz::targets::text;

fuzz_target!(init: rakam_fuzz::begin(text::seeds()), |input: &[u8]| rakam_fuzz::guarded(text::run, input));
