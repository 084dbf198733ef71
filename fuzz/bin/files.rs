#![no_main]

use libfuzzer_sys::fuzz_target;
use rakam_fuzz::targets::files;

fuzz_target!(init: rakam_fuzz::begin(files::seeds()), |input: &[u8]| rakam_fuzz::guarded(files::run, input));
