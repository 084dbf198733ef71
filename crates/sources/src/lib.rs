//! Where events come from beside SQL: topics of Kafka, streams of Kinesis and files, read exactly once.
//!
//! Pure code: no server, no SQL. Offsets, leases and the transaction that stores a batch with its positions are the
//! extension's; here a process may die at any moment and nothing is lost but work.
//!
//! | place | what it is |
//! |---|---|
//! | [`source`] | the two traits of a source, and the consumer's turn |
//! | [`batch`], [`position`] | what a poll brings, and where reading goes on |
//! | [`plan`] | which splits to read next: parents before children |
//! | [`options`] | what `create_source` takes |
//! | [`kafka`], [`kinesis`], [`files`] | the kinds: a state machine that is tested without network, and a client |
//! | [`decode`] | records as events, and as dead letters |
//! | [`columns`], [`framed`] | events as columns, of text and of our own Avro framing |
//! | [`published`] | records that an event store published, and copies among them |
//! | [`publish`] | events out into topics and streams |
//!
//! Every kind passes the tests of `conformance`.
#![forbid(unsafe_code)]

pub mod batch;
pub mod columns;
#[cfg(test)]
mod conformance;
mod cursor;
pub mod decode;
mod error;
pub mod files;
pub mod framed;
pub mod kafka;
pub mod kinesis;
#[cfg(test)]
mod memory;
pub mod options;
pub mod plan;
pub mod position;
pub mod publish;
pub mod published;
pub mod source;

pub use error::{SourceError, StopReason};
