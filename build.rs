//! Keeps the sections that pgrx reads its SQL from, in the shared library only: as a flag for every
//! target it would break the unit-test executables.
fn main() {
    println!("cargo:rustc-link-arg-cdylib=-Wl,--no-gc-sections");
    println!("cargo:rerun-if-changed=build.rs");
}
