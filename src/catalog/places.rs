//! Where storages and attached files are: which of them overlap, and what of a storage is somebody's.

use std::path::Path;

use rakam_lake::period;
use rakam_lake::storage::place::{Place, Position, fixed_part};
use rakam_lake::storage::{BucketUrl, StorageUrl};

use super::store;
use crate::pg::spi::{self, View, arg};
use crate::pg::{Oid, PgError, Result};

/// A storage outside of Postgres that is in use.
#[derive(Debug)]
pub struct Placed {
    pub storage_id: i32,
    pub name: String,
    pub place: Place,
}

/// The storages outside of Postgres that are in use, but those whose server is gone or cannot be understood: nobody
/// reaches them.
pub fn storages(view: View) -> Result<Vec<Placed>> {
    let named = spi::query(
        view,
        "SELECT storage_id, name FROM rakam_internal.storage WHERE kind <> 'local' ORDER BY 1",
        &[],
        |row| Ok((row.must(1)?, row.must::<String>(2)?)),
    )?;
    let placed = |(storage_id, name): (i32, String)| {
        let place = store::place(&name).ok()?;
        Some(Placed {
            storage_id,
            name,
            place,
        })
    };
    Ok(named.into_iter().filter_map(placed).collect())
}

/// Refuses a storage whose place is, holds, or lies in that of another one in use: each would take the other's objects for
/// what nobody knows. The caller has the lock on storages.
pub fn ensure_apart(view: View, name: &str) -> Result<()> {
    let place = store::place(name)?;
    for other in storages(view)? {
        let how = match place.position(&other.place) {
            Some(_) if other.name == name => continue,
            None => continue,
            Some(Position::Same) => "is the same place as",
            Some(Position::Within(_)) => "lies within",
            Some(Position::Around) => "contains",
        };
        return Err(PgError::new(
            "22023",
            format!("url of storage \"{name}\" overlaps that of another storage"),
        )
        .detail(format!(
            "It {how} the url of server \"{}\", which is in use.",
            other.name
        ))
        .hint(
            "Use that storage, where every project has a folder of its own, or give this one a url beside it.",
        ));
    }
    Ok(())
}

/// The name of the storage that a foreign server is, if it is in use as one.
pub fn storage_of_server(view: View, server: Oid) -> Result<Option<String>> {
    spi::first(
        view,
        "SELECT s.name FROM rakam_internal.storage s
         JOIN pg_catalog.pg_foreign_server f ON f.srvname = s.name
         JOIN pg_catalog.pg_foreign_data_wrapper w ON w.oid = f.srvfdw AND w.fdwname = 'rakam'
         WHERE f.oid = $1 AND s.kind <> 'local'",
        &[arg(server)],
        |row| row.must(1),
    )
}

/// The storages in which a file lies, with its path there.
pub fn holding(place: &Place) -> Result<Vec<(i32, String)>> {
    let within = |storage: Placed| match place.position(&storage.place) {
        Some(Position::Within(path)) => Some((storage.storage_id, path)),
        _ => None,
    };
    let storages = storages(View::Current)?;
    Ok(storages.into_iter().filter_map(within).collect())
}

/// Keeps a file that `holder` wrote for good, where it lies in a storage: it is no orphan.
pub fn keep(place: &Place, holder: &str) -> Result<()> {
    for (storage_id, path) in holding(place)? {
        spi::execute(
            "INSERT INTO rakam_internal.file_pin (storage_id, path, holder, until)
             VALUES ($1, $2, $3, 'infinity') ON CONFLICT DO NOTHING",
            &[arg(storage_id), arg(path), arg(holder)],
        )?;
    }
    Ok(())
}

/// The files that an attached table may read, as its URL was written.
#[derive(Debug)]
pub struct AttachedUrl<'a> {
    pub url: &'a str,
    /// The server of the storage that permits it, where that is the reason.
    pub server: Option<&'a str>,
    pub project: &'a str,
    /// Of the project's own storage.
    pub own: &'a str,
}

impl AttachedUrl<'_> {
    /// Everything that it reads lies there. None: in a storage that cannot be reached any more.
    pub fn place(&self) -> Option<Place> {
        if !self.url.contains("://") {
            let folder = period::component(self.project);
            let path = format!("{folder}/{}", fixed_part(self.url));
            return Some(store::place(self.own).ok()?.resolved(&path));
        }
        if let Some((bucket, path)) = BucketUrl::of_objects(self.url).ok()? {
            let path = fixed_part(path);
            return Some(match self.server.map(store::place) {
                Some(Ok(place)) => place.beside(&bucket, &path),
                _ => Place::of_any_bucket(&bucket, &path),
            });
        }
        match StorageUrl::parse(self.url).ok()? {
            StorageUrl::File(path) => {
                let fixed = format!("/{}", fixed_part(path.to_str()?.trim_start_matches('/')));
                Some(Place::of_file(Path::new(&fixed)))
            }
            StorageUrl::Bucket(_) => None,
        }
    }
}

/// Where the files of all attached tables lie. Workers only.
pub fn attached() -> Result<Vec<Place>> {
    let places = spi::query(
        View::Current,
        "SELECT a.url, a.storage, p.name, s.name
         FROM rakam_internal.attached_table a JOIN rakam_internal.project p USING (project_id)
         JOIN rakam_internal.storage s USING (storage_id)",
        &[],
        |row| {
            let (url, server): (String, Option<String>) = (row.must(1)?, row.get(2));
            let (project, own): (String, String) = (row.must(3)?, row.must(4)?);
            let attached = AttachedUrl {
                url: &url,
                server: server.as_deref(),
                project: &project,
                own: &own,
            };
            Ok(attached.place())
        },
    )?;
    Ok(places.into_iter().flatten().collect())
}
