//! Foreign files as batches of events, and the other way round.
//!
//! Pure code: no server. [`format`](mod@format) says what a file is, [`locate`] which files a URL means, [`object`] how those
//! in a bucket are read, [`source`] reads one piece by piece (columns, or events as JSON text), [`convert`] makes a piece the stored layout of a collection by
//! the same rules by which events are typed, and [`sink`] writes the rows of a query. [`table`] reads files as they are, as
//! the rows of a table. [`avro_records`] reads Avro that is in no file, [`csv_record`] a record of CSV out of its file.
#![forbid(unsafe_code)]

mod avro;
mod cast;
mod cell;
pub mod convert;
mod csv;
mod error;
pub mod format;
mod input;
mod json;
pub mod locate;
pub mod log;
pub mod object;
mod parquet_delta;
mod parquet_file;
mod parquet_object;
mod parquet_pages;
mod parquet_rows;
mod parquet_times;
pub mod sink;
pub mod source;
pub mod table;

pub use avro::records as avro_records;
pub use csv::record_again as csv_record;
pub use error::FilesError;
