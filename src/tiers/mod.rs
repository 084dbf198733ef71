//! What moves events between the tiers after the digest, and keeps the tables behind them small. Each file is one
//! periodic step of a worker, in transactions of its own: a crash anywhere repeats it or leaves nothing.

pub mod check;
pub mod compact;
pub mod ddl;
pub mod delete;
pub mod describe;
pub mod erase;
pub mod flush;
pub mod gc;
pub mod hot;
pub mod ids;
pub mod merge;
pub mod object;
pub mod owner;
pub mod reach;
pub mod rewrite;
pub mod rotate;
pub mod upkeep;
