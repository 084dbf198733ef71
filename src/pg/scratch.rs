//! Scratch files: in the server's directory for temporary files and under no name, so that they end with the process
//! whatever ends it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::Path;

use super::error::{PgError, Result};
use super::{bgworker, guc};

/// Where the server keeps temporary files, below its data directory, which is every process' working directory. What
/// begins with this prefix there is removed when the server starts.
const FOLDER: &str = "base/pgsql_tmp";
const PREFIX: &str = "pgsql_tmp";

/// An empty file, to be written and read.
pub fn create() -> Result<File> {
    open().map_err(|e| {
        PgError::new("58030", format!("could not create a temporary file: {e}"))
            .hint("The data directory of the server must be writable and have room.")
    })
}

fn open() -> io::Result<File> {
    let name = format!(
        "{PREFIX}{}.rakam-{}",
        bgworker::my_pid(),
        uuid::Uuid::now_v7()
    );
    let path = Path::new(FOLDER).join(name);
    let options = || {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
    };
    let file = match options() {
        // The server makes it with the first temporary file of its own.
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            match fs::create_dir(FOLDER) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
                _ => {}
            }
            options()?
        }
        file => file?,
    };
    fs::remove_file(&path)?;
    Ok(file)
}

/// An error if so many bytes of scratch files are more than `temp_file_limit` allows.
pub fn ensure_room(bytes: u64) -> Result<()> {
    match guc::temp_file_limit_bytes() {
        Some(limit) if bytes > limit => Err(PgError::new(
            "53400",
            format!(
                "temporary file size exceeds temp_file_limit ({}kB)",
                limit >> 10
            ),
        )
        .hint("Raise temp_file_limit, or lower rakam.target_file_size.")),
        _ => Ok(()),
    }
}
