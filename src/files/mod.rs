//! Files into collections and out of queries: which files a caller may name ([`place`]), the load of files in a worker
//! ([`load`]; its SQL function is with the workers, who run it), and a query's result as a file ([`export`]).

pub mod export;
pub mod load;
pub mod place;
