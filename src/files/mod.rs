//! Files into collections and out of queries: which files a caller may name ([`place`]), the load of files in a worker
//! ([`load`], which [`reading`] and [`chunks`] work for on other threads; its SQL function is with the workers, who run
//! it), and a query's result as a file ([`export`]), or as an object ([`upload`]).

pub mod chunks;
pub mod export;
pub mod load;
pub mod place;
pub mod reading;
pub mod upload;
