#![no_main]

use libfuzzer_sys::fuzz_target;
use rakam_fuzz::targets::avro;

fuzz_target!(init: rakam_fuzz::begin(avro::seeds()), |input: &[u8]| rakam_fuzz::guarded(avro::run, input));
