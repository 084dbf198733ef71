//! Foreign files as the rows of a table: what an attached table reads.
//!
//! [`types`] says which type of Postgres a column of a file is, [`infer`](mod@infer) which columns the files of a prefix have
//! together, [`read`] gives a file's rows as columns that are known, [`value`] converts one column, [`folder`] takes values out
//! of the names of folders. Unlike a load (see [`crate::convert`]) nothing is kept beside a column: a value that does not
//! fit is an error that names the file.

pub mod folder;
pub mod infer;
pub mod read;
pub mod types;
pub mod value;

pub use infer::infer;
pub use read::{Pruner, Reader};
pub use types::SqlType;
pub use value::{Form, Wanted};
