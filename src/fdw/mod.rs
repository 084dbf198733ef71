//! The foreign data wrapper: how SQL reads and writes collections. One file per question.
//!
//! - [`options`]: which options exist, who may set them
//! - [`shippable`]: which conditions mean the same in the engine as in Postgres
//! - [`translate`]: a Postgres expression as the engine's; [`values`] its constants
//! - [`plan`], [`cost`]: the planner's callbacks
//! - [`scan`]: the executor's; [`execution`] is one run of it, [`tiers`] what it reads, [`broker`] how engine threads get
//!   at that, [`unique`] which events of the tail are copies
//! - [`files`]: what a scan of attached files reads
//! - [`tuples`]: Arrow columns as datums
//! - [`modify`]: INSERT and COPY; [`slot`] is how rows of a query come, [`row`] reads a row, [`bulk`] is where rows gather and
//!   are stored
//! - [`explain`]: what EXPLAIN says
//! - [`identity`]: scans that tell which stored row each row is, for deletion
//!
//! Invariants: a plan holds names of columns by number and constants only, nothing that depends on a role, a
//! snapshot or the clock. Every read is made as the effective user of the scan, under its snapshot. What is
//! invisible gives no rows, never an error that would tell that it exists.

pub mod identity;
pub mod options;

mod broker;
mod bulk;
mod columns;
mod cost;
mod execution;
mod explain;
mod files;
mod handler;
mod modify;
mod node;
mod plan;
mod row;
mod scan;
mod shippable;
mod slot;
mod tiers;
mod translate;
mod tuples;
mod unique;
mod values;
