//! The engine against a naive evaluator, over tiers built in memory.
#![allow(clippy::unwrap_used)]

mod all;
mod evolution;
mod filters;
mod fixture;
mod limits;
mod naive;
mod remote;
mod tiers;
