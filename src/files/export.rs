//! The result of a query as a file, on the server or in a bucket, in the caller's session and with the caller's rights.

use std::cell::RefCell;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use pgrx::{default, pg_extern};
use rakam_files::FilesError;
use rakam_files::format::Format;
use rakam_files::locate;
use rakam_files::sink::{self, Cell, ColumnType, Destination, Gathered, RowForm, Sink};
use rakam_lake::owner;
use rakam_lake::storage::PART_BYTES;
use rakam_lake::storage::place::Place as At;
use uuid::Uuid;

use super::place::{self, Access, Place, Root};
use super::upload::Upload;
use crate::catalog::audit;
use crate::catalog::projects::{self, Right};
use crate::catalog::{places, store};
use crate::pg::cursor::{self, Column, Cursor, Integers};
use crate::pg::security::ActAs;
use crate::pg::{ErrorReport, PgError, Result, exit, not_null, wait, xact};

/// Rows fetched at a time: the server has all of them in memory, and long ones may come behind any number of short ones. Fewer
/// of long ones, by what those before them had.
const FETCH_ROWS: u64 = 64;
const FIRST_ROWS: u64 = 16;
const FETCH_BYTES: u64 = 4 << 20;
/// As COPY TO makes its files: others may read them.
const MODE: u32 = 0o644;

/// Writes the result of a query to a file, and returns the number of rows. Runs as the caller, with the project's schema as
/// search path; the file, or object of a bucket, appears under its name when it is complete.
/// SQL: `rakam.copy_to(project text, sql text, url text, format text DEFAULT NULL)`.
/// Errors: 42501 no right to read the project or to write the file, or no SELECT, 42601 not one statement, 22023 unknown
/// format or path, or a pattern, 42701 two columns of one name, 0A000 a format that is not written, 58P02 a storage has the
/// file already.
#[pg_extern(volatile, parallel_unsafe)]
fn copy_to(
    project: Option<&str>,
    sql: Option<&str>,
    url: Option<&str>,
    format: default!(Option<&str>, "NULL"),
) -> std::result::Result<i64, ErrorReport> {
    let rows = audit::call("copy_to", project, url, || {
        export(project, sql, url, format)
    })?;
    Ok(rows as i64)
}

fn export(
    project: Option<&str>,
    sql: Option<&str>,
    url: Option<&str>,
    format: Option<&str>,
) -> Result<u64> {
    let project = projects::authorize(not_null(project, "project")?, Right::Read)?;
    let sql = not_null(sql, "sql")?;
    let url = not_null(url, "url")?;
    let query = cursor::single_select(sql)?;
    let format = match format {
        Some(name) => Format::parse(name)?,
        None => Format::of_name(url)?,
    };
    let form = sink::row_form(format)?;
    let place = place::resolve(&project, url, Access::Write)?;
    let target = Target::new(&place)?;
    let (at, keeping) = {
        let _owner = ActAs::owner();
        let at = target.place();
        let held = places::holding(&at)?;
        (at, held.iter().any(|(_, path)| !owner::is_table(path)))
    };
    if keeping {
        // Else it would pass for an orphan there: that it is none is noted below.
        xact::ensure_writable("write a file of this kind into a storage")?;
    }
    let lines;
    let query = match form {
        RowForm::Line => {
            // The text may end in a comment that has no end of its line; `q` alone would be a column of that name.
            lines =
                format!("SELECT pg_catalog.row_to_json(q.*)::pg_catalog.text FROM (\n{query}\n) q");
            &lines
        }
        RowForm::Cells | RowForm::Values => query,
    };
    let rows = write(query, &project.name, &target, format)?;
    target.publish()?;
    if keeping {
        let _owner = ActAs::owner();
        places::keep(&at, "copy_to")?;
    }
    Ok(rows)
}

fn write(query: &str, schema: &str, target: &Target, format: Format) -> Result<u64> {
    let mut cursor = Cursor::open(query, schema)?;
    let columns: Vec<(String, ColumnType)> = cursor
        .columns()
        .iter()
        .map(|column| (column.name.clone(), column_type(column)))
        .collect();
    let form = sink::row_form(format)?;
    let mut sink = Sink::new(target.create()?, target.name(), format, &columns)?;
    let mut total = 0;
    let mut most = FIRST_ROWS;
    loop {
        wait::check_interrupts();
        let before = sink.bytes();
        let n = cursor.fetch(most as u32, |row| {
            match form {
                RowForm::Values => {
                    let values = columns
                        .iter()
                        .enumerate()
                        .map(|(column, (_, ty))| match ty {
                            ColumnType::Field(_) => Ok(row.value(column)?.map(Cell::Value)),
                            _ => Ok(row.integers(column)?.map(Cell::Integers)),
                        })
                        .collect::<Result<Vec<_>>>()?;
                    sink.values(values.into_iter())?;
                }
                RowForm::Cells => {
                    let cells: Vec<Option<String>> =
                        (0..columns.len()).map(|column| row.text(column)).collect();
                    sink.cells(cells.iter().map(Option::as_deref))?;
                }
                RowForm::Line => sink.line(&row.text(0).unwrap_or_default())?,
            }
            Ok(())
        })?;
        if n == 0 {
            break;
        }
        total += n;
        target.advance()?;
        let row_bytes = (sink.bytes() - before) / n;
        // Longer ones may follow short ones: not many more at once.
        most = (FETCH_BYTES / row_bytes.max(1)).clamp(1, FETCH_ROWS.min(most * 4));
    }
    sink.finish()?;
    Ok(total)
}

/// The type under which a column's values are written.
fn column_type(column: &Column) -> ColumnType {
    match column.integers() {
        Some(Integers::Bits64) => ColumnType::Int8Array,
        Some(_) => ColumnType::Int4Array,
        None => ColumnType::Field(column.field_type()),
    }
}

/// A file to be made: complete under its name, or not there.
enum Target {
    Local(LocalFile),
    Object {
        upload: Upload,
        gathered: Gathered,
        name: String,
        at: At,
    },
}

impl Target {
    fn new(place: &Place) -> Result<Self> {
        let name = locate::relative(&place.pattern)?.to_owned();
        if locate::is_pattern(&name) {
            let refused = FilesError::Path {
                path: place.called(),
                reason: "it is a pattern, and a file to be written has one name",
            };
            let hint = "Name a file without the characters *, ? and [.";
            return Err(PgError::from(refused).hint(hint));
        }
        match &place.root {
            Root::Directory { path, confined } => {
                LocalFile::new(path, *confined, name).map(Self::Local)
            }
            Root::Bucket(bucket) => {
                let name = name.trim_end_matches('/').to_owned();
                Ok(Self::Object {
                    upload: Upload::begin(bucket.open()?, bucket.path(&name), &name)?,
                    gathered: Gathered::default(),
                    at: store::place(&bucket.server)?.below(&bucket.path(&name)),
                    name,
                })
            }
        }
    }

    /// What it is called in messages.
    fn name(&self) -> &str {
        match self {
            Self::Local(file) => &file.name,
            Self::Object { name, .. } => name,
        }
    }

    fn create(&self) -> Result<Destination> {
        match self {
            Self::Local(file) => file.create().map(Destination::File),
            Self::Object { gathered, .. } => Ok(Destination::Gathered(gathered.clone())),
        }
    }

    /// Sends what is there to be sent.
    fn advance(&self) -> Result<()> {
        if let Self::Object {
            upload, gathered, ..
        } = self
        {
            while let Some(part) = gathered.take(PART_BYTES) {
                upload.part(part)?;
            }
        }
        Ok(())
    }

    /// Where it will be.
    fn place(&self) -> At {
        match self {
            Self::Local(file) => At::of_file(&file.path),
            Self::Object { at, .. } => at.clone(),
        }
    }

    /// Gives the complete file its name.
    fn publish(self) -> Result<()> {
        self.advance()?;
        match self {
            Self::Local(file) => file.publish(),
            Self::Object {
                upload, gathered, ..
            } => upload.complete(gathered.take_rest()),
        }
    }
}

thread_local! {
    /// The file being written, which must not outlive this process.
    static UNFINISHED: RefCell<Option<PathBuf>> = const { RefCell::new(None) };
}

/// Removes what was not finished.
fn remove_unfinished() {
    if let Some(path) = UNFINISHED.take() {
        // It may never have been made.
        let _ = fs::remove_file(path);
    }
}

/// A file on the server, under a name of its own beside it until it is complete. Dropped before that, it is removed.
struct LocalFile {
    path: PathBuf,
    temporary: PathBuf,
    name: String,
    /// One that is there is replaced.
    replace: bool,
}

impl LocalFile {
    fn new(root: &Path, confined: bool, name: String) -> Result<Self> {
        let path = root.join(&name);
        let name = locate::called(root, &path);
        let failed = |e: io::Error| PgError::from(FilesError::io("create", &name, &e));
        let parent = path.parent().unwrap_or(root);
        if confined {
            // Without its root the storage is away: nothing is made below the mount point.
            let storage = root.parent().unwrap_or(root);
            fs::metadata(storage).map_err(failed)?;
            fs::create_dir_all(parent).map_err(failed)?;
        }
        let folder = fs::canonicalize(parent).map_err(failed)?;
        if confined && !folder.starts_with(fs::canonicalize(root).map_err(failed)?) {
            return Err(FilesError::NoFile(name).into());
        }
        let file = path.file_name().unwrap_or_default();
        let temporary = folder.join(format!(".{}.{}.tmp", file.display(), Uuid::now_v7()));
        Ok(Self {
            path: folder.join(file),
            temporary,
            name,
            replace: !confined,
        })
    }

    fn create(&self) -> Result<File> {
        exit::on_exit(remove_unfinished);
        UNFINISHED.replace(Some(self.temporary.clone()));
        let create = || -> io::Result<File> {
            let file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .open(&self.temporary)?;
            // Whatever the server's umask.
            file.set_permissions(fs::Permissions::from_mode(MODE))?;
            Ok(file)
        };
        create().map_err(|e| FilesError::io("create", &self.name, &e).into())
    }

    /// Gives the complete file its name.
    fn publish(&self) -> Result<()> {
        let failed = |e: io::Error| PgError::from(FilesError::io("create", &self.name, &e));
        if self.replace {
            fs::rename(&self.temporary, &self.path).map_err(failed)?;
        } else {
            // Data files are in the same storage: nothing there is ever replaced.
            fs::hard_link(&self.temporary, &self.path).map_err(failed)?;
        }
        sync(self.path.parent()).map_err(failed)
    }
}

fn sync(folder: Option<&Path>) -> io::Result<()> {
    match folder {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

impl Drop for LocalFile {
    fn drop(&mut self) {
        remove_unfinished();
    }
}
