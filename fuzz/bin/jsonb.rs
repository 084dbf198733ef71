#![no_main]

use libfuzzer_sys::fuzz_target;
use rakam_fuzz::targets::jsonb;

fuzz_target!(init: rakam_fuzz::begin(jsonb::seeds()), |input: &[u8]| rakam_fuzz::guarded(jsonb::run, input));
