//! Files of a storage are what the same files of a directory are. A directory stands in for a bucket: it is read by the same
//! road.

use super::*;
use std::fs;
use std::path::Path as FilePath;
use std::sync::atomic::{AtomicUsize, Ordering};

use arrow::array::{Array, ArrayRef, AsArray, Int64Array, RecordBatch, StringArray};
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;
use rakam_lake::cache::Memory;
use rakam_lake::storage::{StorageConfig, StorageUrl};

use crate::format::{Format, Options};
use crate::locate::{Found, Root};
use crate::source::{self, Meter, Position, Rows, Spec};

#[derive(Debug, Default)]
struct Unbounded(AtomicUsize);

impl Memory for Unbounded {
    fn try_take(&self, bytes: usize) -> bool {
        self.0.fetch_add(bytes, Ordering::Relaxed);
        true
    }

    fn give_back(&self, bytes: usize) {
        self.0.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// Few threads: nobody may wait for one that somebody who waits has.
fn run<T>(work: impl Future<Output = T>) -> T {
    let threads = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(1 + WAITING_THREADS)
        .enable_all()
        .build()
        .unwrap();
    threads.block_on(work)
}

fn bucket(root: &FilePath, folder: &str, stop: &Stop) -> Root {
    let url = StorageUrl::parse(&format!("file://{}", root.display())).unwrap();
    let storage = Storage::open(&StorageConfig::directory(url)).unwrap();
    let fetching = Fetching {
        key: "1/test".to_owned(),
        fetcher: Arc::new(Fetcher::new(Arc::new(Unbounded::default()))),
        directory: None,
        counters: Arc::default(),
    };
    Root::Bucket(Objects::new(storage, folder, fetching, stop).unwrap())
}

fn spec() -> Spec {
    Spec {
        format: None,
        options: Options::default(),
        max_record_bytes: 1 << 20,
    }
}

fn names(found: Result<Vec<Found>, FilesError>) -> Result<Vec<String>, &'static str> {
    found
        .map(|found| found.into_iter().map(|f| f.name).collect())
        .map_err(|e| e.sqlstate())
}

#[test]
fn objects_are_found_as_files_are() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root");
    for name in [
        "p/a.csv",
        "p/b.csv.gz",
        "p/[1].csv",
        "p/.hidden.csv",
        "p/_SUCCESS",
        "p/plain",
        "p/2024/05/x.csv",
        "p/_year=1/y.json",
        "p/_temporary/z.csv",
        "other/o.csv",
    ] {
        fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
        fs::write(root.join(name), name).unwrap();
    }
    // As tools mark a folder.
    fs::write(root.join("p/marker"), "").unwrap();
    let stop = Stop::new();
    let files = Root::Directory {
        path: root.join("p"),
        confined: true,
    };
    let objects = bucket(&root, "p", &stop);
    for pattern in [
        "a.csv",
        "*.csv",
        "[1].csv",
        "[ab].csv*",
        "**/x.csv",
        "2024/*/?.csv",
        "none.csv",
        "no*e",
        "../other/o.csv",
        "",
        "a//b",
        "_year=1/*",
    ] {
        let (ours, theirs) = run(async {
            (
                objects.find(pattern, &stop).await,
                files.find(pattern, &stop).await,
            )
        });
        assert_eq!(names(ours), names(theirs), "{pattern}");
    }
    for (prefix, format) in [
        ("2024", None),
        ("2024/", None),
        ("a.csv", None),
        ("*.csv", None),
        ("_year=1", Some(Format::Ndjson)),
        ("2024", Some(Format::Avro)),
        ("none", None),
    ] {
        let (ours, theirs) = run(async {
            (
                objects.below(prefix, format, &stop).await,
                files.below(prefix, format, &stop).await,
            )
        });
        assert_eq!(names(ours), names(theirs), "{prefix}");
    }
    // A folder's marker is none of its data.
    let all = bucket(&root, "", &stop);
    let csv = Some(Format::Csv);
    assert_eq!(
        names(run(all.below("p", csv, &stop))),
        Ok([
            "p/2024/05/x.csv",
            "p/[1].csv",
            "p/a.csv",
            "p/b.csv.gz",
            "p/plain"
        ]
        .map(str::to_owned)
        .to_vec())
    );
    stop.stop();
    assert_eq!(names(run(objects.find("*", &stop))), Err("57014"));
}

fn table(rows: i64) -> RecordBatch {
    let noise = |n: i64| format!("{:x}", n.wrapping_mul(0x9e37_79b9_7f4a_7c15_u64 as i64));
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("n", Arc::new(Int64Array::from_iter_values(0..rows))),
        (
            "text",
            Arc::new(StringArray::from_iter_values((0..rows).map(noise))),
        ),
        (
            "long",
            Arc::new(StringArray::from_iter_values(
                (0..rows).map(|n| noise(n).repeat(4)),
            )),
        ),
    ];
    RecordBatch::try_from_iter(columns).unwrap()
}

/// What a file holds, from a position on, in one text.
fn content(file: &Found, from: Position) -> Result<(String, Vec<Position>), FilesError> {
    let mut source = source::open(file, &spec(), from, &Meter::default())?;
    let (mut text, mut positions) = (String::new(), Vec::new());
    while let Some(piece) = source.next()? {
        assert!(piece.bad.is_empty());
        positions.push(piece.after);
        match piece.rows {
            Rows::Events(events) => text.extend(events.into_iter().map(|e| e.json + "\n")),
            Rows::Columns { batch, .. } => {
                let last = batch.num_rows() - 1;
                for (field, column) in batch.schema().fields().iter().zip(batch.columns()) {
                    let bytes = column.get_array_memory_size();
                    let shown = match column.as_string_opt::<i32>() {
                        Some(texts) => texts.value(last).to_owned(),
                        None => format!("{:?}", column.slice(last, 1)),
                    };
                    text += &format!("{} {bytes} {shown}\n", field.name());
                }
            }
        }
    }
    Ok((text, positions))
}

#[test]
fn objects_hold_what_files_hold() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let batch = table(50_000);
    let mut csv = b"n,text\n".to_vec();
    for n in 0..120_000 {
        csv.extend_from_slice(format!("{n},text of number {n}\n").as_bytes());
    }
    let lines: String = (0..20_000).map(|n| format!("{{\"n\":{n}}}\n")).collect();
    fs::write(root.join("a.csv"), &csv).unwrap();
    fs::write(
        root.join("b.csv.zst"),
        zstd::encode_all(&csv[..], 1).unwrap(),
    )
    .unwrap();
    fs::write(root.join("c.ndjson"), lines).unwrap();
    fs::write(root.join("empty.csv"), "").unwrap();
    for (name, rows) in [("d.parquet", 7_000), ("e.parquet", 1 << 20)] {
        let properties = WriterProperties::builder()
            .set_max_row_group_row_count(Some(rows))
            .set_dictionary_enabled(false)
            .build();
        let file = fs::File::create(root.join(name)).unwrap();
        let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
    }
    let stop = Stop::new();
    let objects = bucket(root, "", &stop);
    for found in run(objects.find("*", &stop)).unwrap() {
        let file = Found::file(root.join(&found.name), &found.name);
        let (whole, positions) = content(&file, Position::default()).unwrap();
        let read = |from| {
            let found = found.clone();
            run(async { blocking(move || content(&found, from)).await.unwrap() })
        };
        let (same, at) = read(Position::default()).unwrap();
        assert!(same == whole && at == positions, "{}", found.name);
        if let Some(&middle) = positions.get(positions.len() / 2) {
            let rest = content(&file, middle).unwrap();
            assert!(
                read(middle).unwrap() == rest,
                "{} from {middle:?}",
                found.name
            );
        }
    }
}

#[test]
fn an_object_that_is_not_what_it_was_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let stop = Stop::new();
    let objects = bucket(root, "", &stop);
    let read = |found: &Found| {
        let found = found.clone();
        let read = run(async { blocking(move || content(&found, Position::default())).await });
        read.unwrap()
            .map(drop)
            .map_err(|e| (e.sqlstate(), e.to_string()))
    };
    for name in ["x.csv", "x.csv.gz", "x.parquet"] {
        let path = root.join(name);
        fs::write(&path, vec![b'x'; 100_000]).unwrap();
        let found = run(objects.find(name, &stop)).unwrap().remove(0);
        fs::write(&path, vec![b'x'; 100_001]).unwrap();
        let changed = format!("file \"{name}\" was changed while it was read");
        assert_eq!(read(&found), Err(("58030", changed)));
        fs::remove_file(&path).unwrap();
        assert_eq!(
            read(&found),
            Err(("58P01", format!("file \"{name}\" is missing")))
        );
    }
    fs::write(root.join("y.csv"), "a\n1\n").unwrap();
    let found = run(objects.find("y.csv", &stop)).unwrap().remove(0);
    stop.stop();
    assert_eq!(read(&found).map_err(|e| e.0), Err("57014"));
}

#[test]
fn a_loads_file_is_another_one_when_it_changes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.csv");
    let stop = Stop::new();
    let objects = bucket(folder.path(), "", &stop);
    let identity = || {
        run(objects.find("x.csv", &stop))
            .unwrap()
            .remove(0)
            .identity()
    };
    fs::write(&path, "a\n1\n").unwrap();
    let first = identity();
    assert_eq!(identity(), first);
    fs::write(&path, "a\n12\n").unwrap();
    assert_ne!(identity(), first);
}
