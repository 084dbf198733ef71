//! Which files a path or pattern means.

use std::fs;
use std::path::{Component, Path, PathBuf};
use std::time::UNIX_EPOCH;

use glob::MatchOptions;

use crate::error::FilesError;

/// Most files that one pattern may match.
const MAX_FILES: usize = 100_000;

/// A file found, as it was then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Without symbolic links.
    pub path: PathBuf,
    /// What it is called in messages: as the caller wrote it, patterns resolved.
    pub name: String,
    pub bytes: u64,
    pub modified_ns: u128,
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
    let options = MatchOptions {
        case_sensitive: true,
        require_literal_separator: true,
        require_literal_leading_dot: true,
    };
    let whole = format!("{}/{pattern}", base.trim_end_matches('/'));
    let paths = glob::glob_with(&whole, options).map_err(|_| FilesError::Path {
        path: pattern.to_owned(),
        reason: "it is not a valid pattern",
    })?;
    for path in paths {
        let path =
            path.map_err(|e| FilesError::io("open", &e.path().display().to_string(), e.error()))?;
        if let Some(file) = file(&root, &path, confined)? {
            found.push(file);
        }
        if found.len() > MAX_FILES {
            return Err(FilesError::Path {
                path: pattern.to_owned(),
                reason: "it matches more than 100,000 files",
            });
        }
    }
    if found.is_empty() {
        return Err(FilesError::NoFile(pattern.to_owned()));
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// The file at this path; None if there is no file that may be read.
fn file(root: &Path, path: &Path, confined: bool) -> Result<Option<Found>, FilesError> {
    let Ok(real) = fs::canonicalize(path) else {
        return Ok(None);
    };
    if confined && !real.starts_with(root) {
        return Ok(None);
    }
    let name = path.strip_prefix(root).unwrap_or(path);
    let name = name.display().to_string();
    let metadata = fs::metadata(&real).map_err(|e| FilesError::io("open", &name, &e))?;
    if !metadata.is_file() {
        return Ok(None);
    }
    let modified = metadata
        .modified()
        .ok()
        .and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    Ok(Some(Found {
        path: real,
        name,
        bytes: metadata.len(),
        modified_ns: modified.map_or(0, |since| since.as_nanos()),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_inside_the_root_only() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        fs::create_dir_all(root.join("2024/05")).unwrap();
        for name in [
            "b.csv",
            "a.csv",
            "a.json",
            "2024/05/x.csv",
            ".hidden.csv",
            "[1].csv",
        ] {
            fs::write(root.join(name), name).unwrap();
        }
        fs::write(folder.path().join("secret.csv"), "secret").unwrap();
        std::os::unix::fs::symlink(folder.path().join("secret.csv"), root.join("link.csv"))
            .unwrap();
        std::os::unix::fs::symlink(root.join("a.csv"), root.join("own.csv")).unwrap();

        let names = |pattern: &str, confined| {
            find(&root, pattern, confined)
                .map(|found| found.into_iter().map(|f| f.name).collect::<Vec<String>>())
                .map_err(|e| e.sqlstate())
        };
        let owned = |names: &[&str]| Ok(names.iter().map(|&n| n.to_owned()).collect::<Vec<_>>());
        assert_eq!(names("a.csv", true), owned(&["a.csv"]));
        assert_eq!(names("*.json", true), owned(&["a.json"]));
        assert_eq!(
            names("*.csv", true),
            owned(&["[1].csv", "a.csv", "b.csv", "own.csv"])
        );
        assert_eq!(names("[1].csv", true), owned(&["[1].csv"]));
        assert_eq!(names("**/x.csv", true), owned(&["2024/05/x.csv"]));
        assert_eq!(names("2024/*/?.csv", true), owned(&["2024/05/x.csv"]));
        assert_eq!(names("link.csv", true), Err("58P01"));
        assert_eq!(names("link.csv", false), owned(&["link.csv"]));
        assert_eq!(names("none.csv", true), Err("58P01"));
        assert_eq!(names("2024", true), Err("58P01"));
        for bad in [
            "",
            "/etc/passwd",
            "../secret.csv",
            "a/../../secret.csv",
            "a\0b",
            "./a.csv",
        ] {
            assert_eq!(names(bad, true), Err("22023"), "{bad}");
        }
        let found = find(&root, "b.csv", true).unwrap();
        assert_eq!(found[0].bytes, 5);
        assert!(found[0].modified_ns > 0);
        assert!(find(&folder.path().join("away"), "*.csv", true).is_err());
    }
}
