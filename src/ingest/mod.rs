//! The ways in: collect, the digest of what it left in the inbox, and [`append`], the one door through which a
//! batch of events enters the hot tier.

pub mod admission;
pub mod append;
pub mod batch;
mod builtin;
pub mod collect;
pub mod dedupe;
pub mod digest;
pub mod known;
pub mod learn;
pub mod lookup;
mod making;
pub mod mapper;
pub mod quota;
mod replay;
pub mod room;
pub mod stream;
mod track;
mod waiting;
