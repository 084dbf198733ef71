#![forbid(unsafe_code)]
//! The query engine: relational IR in, Arrow batches out, on DataFusion.
//!
//! Pure: it knows nothing of the server. Data that only the server can read (chunks, the inbox tail) is asked
//! for through [`Broker`]; data files are read straight from their object stores. Plans are built as physical
//! plans: there is no SQL, no catalogue and no optimizer pass in the way of a query.
//!
//! Start reading at [`ir`], then [`scan`], the road from a plan to batches. `adapt` is where a file or chunk of
//! an older schema becomes the table of today.

pub mod all;
pub mod context;
pub mod error;
pub mod ir;
pub mod memory;
pub mod metrics;
pub mod rows;
pub mod scan;

mod adapt;
mod hot;
mod parquet_file;
mod translate;

pub use all::{Part, execute_all};
pub use context::EngineContext;
pub use error::EngineError;
pub use ir::{CmpOp, Expr, ScanPlan};
pub use memory::{Budget, BudgetPool, RequestMemory, Reserved};
pub use metrics::ScanMetrics;
pub use scan::{Broker, ChunkRef, FileRef, ScanInput, ScanStream, execute};
