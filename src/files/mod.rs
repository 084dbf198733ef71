//! Files into collections: which files a caller may name ([`place`]), and their load in a worker ([`load`]). The SQL
//! functions are with the workers, who run the loads.

pub mod load;
pub mod place;
