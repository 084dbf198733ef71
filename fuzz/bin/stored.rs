#![no_main]

use libfuzzer_sys::fuzz_target;
use rakam_fuzz::targets::stored;

fuzz_target!(init: rakam_fuzz::begin(stored::seeds()), |input: &[u8]| rakam_fuzz::guarded(stored::run, input));
