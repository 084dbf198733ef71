#![no_main]

use libfuzzer_sys::fuzz_target;
use rakam_fuzz::targets::event;

fuzz_target!(init: rakam_fuzz::begin(event::seeds()), |input: &[u8]| rakam_fuzz::guarded(event::run, input));
