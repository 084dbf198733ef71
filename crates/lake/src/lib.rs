//! The lake: how events lie in chunks and data files, and how files are found, skipped and kept.
//!
//! Pure code: no server. Start reading at [`chunk`] and [`row_chunk`] (the hot tier), then [`backlog`], [`period`], [`sort`]
//! and [`mod@write`] (the road of chunks into a data file), [`stats`] and [`prune`] (the road of a query past files),
//! [`compaction`] and [`merge`] (few large files of many small ones), [`storage`] (where files lie), [`owner`] (whose they
//! are), [`cache`] (how buckets are read), [`untrusted`] (files that others may have written), [`id_run`] (what
//! de-duplication remembers).
#![forbid(unsafe_code)]

pub mod backlog;
pub mod cache;
pub mod chunk;
pub mod compaction;
pub mod describe;
pub mod encoding;
pub mod error;
pub mod file_info;
pub mod footer;
pub mod id_filter;
pub mod id_reader;
pub mod id_run;
pub mod id_set;
pub mod merge;
pub mod owner;
pub mod parts;
pub mod period;
pub mod prune;
pub mod read;
pub mod row_chunk;
pub mod rows;
pub mod scalar;
pub mod sort;
pub mod stats;
pub mod storage;
pub mod untrusted;
pub mod write;

mod seal;
#[cfg(any(test, feature = "fuzzing"))]
pub mod testing;
mod thrift;
pub mod varint;

pub use error::LakeError;
