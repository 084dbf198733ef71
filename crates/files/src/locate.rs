//! Which files a path or pattern means.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::UNIX_EPOCH;

use glob::MatchOptions;

use crate::error::FilesError;
use crate::format::Format;
use crate::object::{Object, Objects, Stop, blocking};

/// Most files that one pattern may match.
const MAX_FILES: usize = 100_000;

/// Where files are.
#[derive(Clone)]
pub enum Root {
    /// Below a directory; if confined, nothing outside of it is meant, not even through a symbolic link.
    Directory {
        path: PathBuf,
        confined: bool,
    },
    Bucket(Objects),
}

/// A file found, as it was then.
#[derive(Debug, Clone)]
pub struct Found {
    pub at: Location,
    /// What it is called in messages: as the caller wrote it, patterns resolved.
    pub name: String,
    pub bytes: u64,
    pub modified_ns: u128,
}

/// Where a file is.
#[derive(Debug, Clone)]
pub enum Location {
    /// Without symbolic links.
    File(PathBuf),
    Object(Object),
}

impl Found {
    /// A file that is known to be there.
    pub fn file(path: impl Into<PathBuf>, name: &str) -> Self {
        Self {
            at: Location::File(path.into()),
            name: name.to_owned(),
            bytes: 0,
            modified_ns: 0,
        }
    }

    /// What makes it this file, as it is now: one that has been changed is another one.
    pub fn identity(&self) -> Vec<u8> {
        let place = match &self.at {
            Location::File(path) => path.as_os_str().as_encoded_bytes(),
            Location::Object(object) => object.info.path.as_bytes(),
        };
        let mut identity = Vec::with_capacity(place.len() + 64);
        identity.extend_from_slice(&(place.len() as u64).to_le_bytes());
        identity.extend_from_slice(place);
        self.write_version(&mut identity);
        identity
    }

    /// What tells it from another file of its name.
    pub fn version(&self) -> Vec<u8> {
        let mut version = Vec::with_capacity(64);
        self.write_version(&mut version);
        version
    }

    fn write_version(&self, out: &mut Vec<u8>) {
        let tag = match &self.at {
            Location::File(_) => None,
            Location::Object(object) => object.info.tag(),
        };
        out.extend_from_slice(&self.bytes.to_le_bytes());
        match tag {
            // A look at one object says less of its time than a list.
            Some(tag) => {
                out.extend_from_slice(&(tag.len() as u64).to_le_bytes());
                out.extend_from_slice(tag.as_bytes());
            }
            None => out.extend_from_slice(&self.modified_ns.to_le_bytes()),
        }
    }

    /// Whether reading it waits for a network.
    pub fn is_remote(&self) -> bool {
        matches!(self.at, Location::Object(_))
    }
}

impl From<Object> for Found {
    fn from(object: Object) -> Self {
        let modified = object.info.modified.duration_since(UNIX_EPOCH);
        Self {
            name: object.name.clone(),
            bytes: object.info.bytes,
            modified_ns: modified.map_or(0, |since| since.as_nanos()),
            at: Location::Object(object),
        }
    }
}

impl Root {
    /// The files that a relative path or pattern names, in the order of their names: see [`find`]. Where `stop` says so it
    /// ends.
    pub async fn find(&self, pattern: &str, stop: &Stop) -> Result<Vec<Found>, FilesError> {
        match self {
            Self::Directory { path, confined } => {
                let (path, confined, pattern) = (path.clone(), *confined, pattern.to_owned());
                let found = async { blocking(move || find(&path, &pattern, confined)).await? };
                stop.or(found).await
            }
            Self::Bucket(objects) => find_objects(objects, pattern).await,
        }
    }

    /// The files of a prefix, in the order of their names: see [`below`]. A bucket has no folders: a prefix below which
    /// nothing at all lies is one that is not there.
    pub async fn below(
        &self,
        prefix: &str,
        format: Option<Format>,
        stop: &Stop,
    ) -> Result<Vec<Found>, FilesError> {
        self.data(relative(prefix)?, format, MAX_FILES, stop).await
    }

    /// The same of a prefix that may be empty, which is everything, with so many files at most.
    pub async fn data(
        &self,
        prefix: &str,
        format: Option<Format>,
        most: usize,
        stop: &Stop,
    ) -> Result<Vec<Found>, FilesError> {
        if !prefix.is_empty() {
            relative(prefix)?;
        }
        match self {
            Self::Directory { path, confined } => {
                let (path, confined, prefix) = (path.clone(), *confined, prefix.to_owned());
                let stopped = stop.clone();
                let look = move || {
                    let go_on = || !stopped.is_stopped();
                    data_below(&path, &prefix, confined, (format, most), &go_on)
                };
                stop.or(async { blocking(look).await? }).await
            }
            Self::Bucket(objects) => objects_below(objects, prefix, (format, most)).await,
        }
    }

    /// The file of this name; None if there is none. An error if its directory or bucket cannot be looked at.
    pub async fn get(&self, name: &str, stop: &Stop) -> Result<Option<Found>, FilesError> {
        relative(name)?;
        match self {
            Self::Directory { path, confined } => {
                let (path, confined, name) = (path.clone(), *confined, name.to_owned());
                let look = move || {
                    let root = there(&path)?;
                    file(&root, &root.join(&name), confined)
                };
                stop.or(async { blocking(look).await? }).await
            }
            Self::Bucket(objects) => Ok(objects.get(name).await?.map(Found::from)),
        }
    }

    /// That the directory or bucket is there.
    pub async fn check(&self, stop: &Stop) -> Result<(), FilesError> {
        match self {
            Self::Directory { path, .. } => {
                let path = path.clone();
                let look = move || there(&path).map(drop);
                stop.or(async { blocking(look).await? }).await
            }
            Self::Bucket(objects) => objects.check().await,
        }
    }
}

/// A root without symbolic links. Where it lies is not for everybody to know.
fn there(root: &Path) -> Result<PathBuf, FilesError> {
    fs::canonicalize(root).map_err(|e| FilesError::io("open", "of the storage", &e))
}

/// Whether a name has characters that stand for others: what is read under it may be several files.
pub fn is_pattern(name: &str) -> bool {
    name.contains(['*', '?', '['])
}

/// Shapes: `*`, `?`, `[…]` within a name, `**` for any folders; names that begin with a dot need one in the pattern.
const MATCHING: MatchOptions = MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: true,
};

/// The folders of a pattern before its first one that is none.
fn fixed_folder(pattern: &str) -> &str {
    let mut end = 0;
    for (at, _) in pattern.match_indices('/') {
        if is_pattern(&pattern[end..at]) {
            break;
        }
        end = at;
    }
    &pattern[..end]
}

fn too_many(path: &str, reason: &'static str) -> FilesError {
    FilesError::Path {
        path: path.to_owned(),
        reason,
    }
}

async fn find_objects(objects: &Objects, pattern: &str) -> Result<Vec<Found>, FilesError> {
    let pattern = relative(pattern)?;
    if let Some(object) = objects.get(pattern).await? {
        return Ok(vec![object.into()]);
    }
    let matched = match is_pattern(pattern) {
        true => matching(objects, pattern).await?,
        false => Vec::new(),
    };
    if matched.is_empty() {
        // A bucket that is not there has no objects either.
        objects.check().await?;
        return Err(FilesError::NoFile(pattern.to_owned()));
    }
    Ok(matched)
}

async fn matching(objects: &Objects, pattern: &str) -> Result<Vec<Found>, FilesError> {
    let shape = glob::Pattern::new(pattern).map_err(|_| FilesError::Path {
        path: pattern.to_owned(),
        reason: "it is not a valid pattern",
    })?;
    let mut count = 0;
    let found = objects
        .list(fixed_folder(pattern), |name, bytes| {
            let wanted = shape.matches_with(name, MATCHING) && !is_marker(name, bytes);
            count += usize::from(wanted);
            if count > MAX_FILES {
                return Err(too_many(pattern, "it matches more than 100,000 files"));
            }
            Ok(wanted)
        })
        .await?;
    Ok(sorted(found))
}

async fn objects_below(
    objects: &Objects,
    prefix: &str,
    (format, most): (Option<Format>, usize),
) -> Result<Vec<Found>, FilesError> {
    let prefix = prefix.trim_end_matches('/');
    if !prefix.is_empty()
        && let Some(object) = objects.get(prefix).await?
    {
        return Ok(vec![object.into()]);
    }
    if is_pattern(prefix) {
        return matching(objects, prefix).await;
    }
    let (mut count, mut seen) = (0, false);
    let found = objects
        .list(prefix, |name, bytes| {
            seen = true;
            let rest = match prefix {
                "" => Some(name),
                _ => name.strip_prefix(prefix).and_then(|r| r.strip_prefix('/')),
            };
            let Some(rest) = rest else {
                return Ok(false);
            };
            let mut names = rest.split('/').rev();
            let file = names.next().unwrap_or_default();
            let wanted = !names.chain([file]).any(is_hidden)
                && is_data(file, format)
                && !is_marker(file, bytes);
            count += usize::from(wanted);
            if count > most {
                return Err(too_many(prefix, "there are too many files below it"));
            }
            Ok(wanted)
        })
        .await?;
    if !seen {
        if prefix.is_empty() {
            objects.check().await?;
            return Ok(Vec::new());
        }
        return Err(FilesError::NoFile(prefix.to_owned()));
    }
    Ok(sorted(found))
}

fn sorted(objects: Vec<Object>) -> Vec<Found> {
    let mut found: Vec<Found> = objects.into_iter().map(Found::from).collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

/// An empty object by which tools show a folder.
fn is_marker(name: &str, bytes: u64) -> bool {
    bytes == 0 && Format::of_name(name).is_err()
}

/// Whether what a folder or a file is called says that it is no data.
fn is_hidden(name: &str) -> bool {
    name.starts_with('.') || name.starts_with('_') && !name.contains('=')
}

/// The plain relative path that `path` is: no root, no step upwards.
pub fn relative(path: &str) -> Result<&str, FilesError> {
    let invalid = |reason| FilesError::Path {
        path: path.to_owned(),
        reason,
    };
    if path.contains(['\0', '\\']) {
        return Err(invalid("it contains a character that is not allowed"));
    }
    if path.is_empty() {
        return Err(invalid("it is empty"));
    }
    let plain = |component: Component<'_>| matches!(component, Component::Normal(_));
    if !Path::new(path).components().all(plain) {
        return Err(invalid(
            "it must stay inside its storage: no leading slash, no \".\" or \"..\"",
        ));
    }
    Ok(path)
}

/// The files below `root` that a relative path or pattern names, in the order of their names. With `confined`, a symbolic
/// link that leads out of the root is not followed.
///
/// Shapes: `*`, `?`, `[…]` within a name, `**` for any folders; names that begin with a dot need one in the pattern. A
/// file whose name is the pattern itself is that file.
pub fn find(root: &Path, pattern: &str, confined: bool) -> Result<Vec<Found>, FilesError> {
    let pattern = relative(pattern)?;
    let root = match fs::canonicalize(root) {
        Ok(root) => root,
        // Where a storage lies is not for everybody to know.
        Err(_) if confined => return Err(FilesError::NoFile(pattern.to_owned())),
        Err(e) => return Err(FilesError::io("open", &root.display().to_string(), &e)),
    };
    let mut found = Vec::new();
    if let Some(file) = file(&root, &root.join(pattern), confined)? {
        found.push(file);
        return Ok(found);
    }
    let base = glob::Pattern::escape(&root.to_string_lossy());
    let whole = format!("{}/{pattern}", base.trim_end_matches('/'));
    let name = called(&root, &root.join(pattern));
    let paths = glob::glob_with(&whole, MATCHING).map_err(|_| FilesError::Path {
        path: name.clone(),
        reason: "it is not a valid pattern",
    })?;
    for path in paths {
        let path =
            path.map_err(|e| FilesError::io("open", &e.path().display().to_string(), e.error()))?;
        if let Some(file) = file(&root, &path, confined)? {
            found.push(file);
        }
        if found.len() > MAX_FILES {
            return Err(too_many(&name, "it matches more than 100,000 files"));
        }
    }
    if found.is_empty() {
        return Err(FilesError::NoFile(name));
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// The files of a prefix: a file, what a pattern matches, or everything below a folder, in the order of their names. None of
/// them is outside of the folder that the prefix names, not even through a symbolic link. `go_on` is asked now and then.
///
/// Below a folder names that begin with a dot or an underscore are no data (`.crc`, `_SUCCESS`), unless they are
/// `key=value`; nor are files whose suffix is that of another format, or without a format of none.
///
/// Error: 58P01 if the file, or the folder, is not there; a folder without files is none.
pub fn below(
    root: &Path,
    prefix: &str,
    confined: bool,
    format: Option<Format>,
    go_on: &dyn Fn() -> bool,
) -> Result<Vec<Found>, FilesError> {
    data_below(
        root,
        relative(prefix)?,
        confined,
        (format, MAX_FILES),
        go_on,
    )
}

fn data_below(
    root: &Path,
    prefix: &str,
    confined: bool,
    (format, most): (Option<Format>, usize),
    go_on: &dyn Fn() -> bool,
) -> Result<Vec<Found>, FilesError> {
    let gone = || FilesError::NoFile(called(root, &root.join(prefix)));
    let root = match fs::canonicalize(root) {
        Ok(root) => root,
        Err(_) if confined => return Err(gone()),
        Err(e) => return Err(FilesError::io("open", &root.display().to_string(), &e)),
    };
    let whole = root.join(prefix);
    let plain = if !is_pattern(prefix) || whole.exists() {
        whole.as_path()
    } else {
        let fixed = prefix.split('/').take_while(|name| !is_pattern(name));
        &root.join(fixed.collect::<PathBuf>())
    };
    let base = fs::canonicalize(plain).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => gone(),
        _ if confined => gone(),
        _ => FilesError::io("open", &called(&root, plain), &e),
    })?;
    if confined && !base.starts_with(&root) {
        return Err(gone());
    }
    if plain != whole {
        return match find(&root, prefix, confined) {
            Ok(mut found) => {
                found.retain(|file| lies_in(file, &base));
                Ok(found)
            }
            Err(FilesError::NoFile(_)) => Ok(Vec::new()),
            Err(error) => Err(error),
        };
    }
    if base.is_file() {
        return Ok(file(&root, &whole, confined)?.into_iter().collect());
    }
    let mut found = Vec::new();
    let mut folders = vec![whole];
    while let Some(folder) = folders.pop() {
        let failed = |e: io::Error| FilesError::io("open", &called(&root, &folder), &e);
        for entry in fs::read_dir(&folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if !go_on() {
                return Err(FilesError::Cancelled);
            }
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if is_hidden(&name) {
                continue;
            }
            let kind = entry.file_type().map_err(failed)?;
            if kind.is_dir() {
                folders.push(entry.path());
            } else if is_data(&name, format)
                && let Some(file) = file(&root, &entry.path(), true)?
                && lies_in(&file, &base)
            {
                found.push(file);
            }
            if found.len() > most {
                let name = called(&root, &root.join(prefix));
                return Err(too_many(&name, "there are too many files below it"));
            }
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

fn lies_in(file: &Found, folder: &Path) -> bool {
    matches!(&file.at, Location::File(path) if path.starts_with(folder))
}

/// Whether a file below a folder is one of its data, by its suffix.
fn is_data(name: &str, format: Option<Format>) -> bool {
    let is_json = |format| matches!(format, Format::Json | Format::Ndjson);
    match (Format::of_name(name), format) {
        (Ok(_), None) => true,
        (Ok(own), Some(format)) => own == format || is_json(own) && is_json(format),
        (Err(_), format) => format.is_some(),
    }
}

/// What a path is called in messages: relative to its root, unless it is the whole of the server.
pub fn called(root: &Path, path: &Path) -> String {
    let whole = Path::new("/");
    let name = match path.strip_prefix(root) {
        Ok(name) if root != whole => name,
        _ => path,
    };
    name.display().to_string()
}

/// The file at this path; None if there is no file that may be read.
fn file(root: &Path, path: &Path, confined: bool) -> Result<Option<Found>, FilesError> {
    let Ok(real) = fs::canonicalize(path) else {
        return Ok(None);
    };
    if confined && !real.starts_with(root) {
        return Ok(None);
    }
    let name = called(root, path);
    let metadata = fs::metadata(&real).map_err(|e| FilesError::io("open", &name, &e))?;
    if !metadata.is_file() {
        return Ok(None);
    }
    let modified = metadata
        .modified()
        .ok()
        .and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    Ok(Some(Found {
        at: Location::File(real),
        name,
        bytes: metadata.len(),
        modified_ns: modified.map_or(0, |since| since.as_nanos()),
    }))
}

#[cfg(test)]
mod tests;
