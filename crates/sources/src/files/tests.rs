use std::fs;

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arrow::array::{ArrayRef, DictionaryArray, Int32Array, RecordBatch, StringArray};
use parquet::arrow::ArrowWriter;
use rakam_files::format::{Format, Options};
use rakam_files::object::Fetching;
use rakam_lake::cache::{Fetcher, Memory};
use rakam_lake::storage::{Storage, StorageConfig, StorageUrl};
use tempfile::TempDir;

use super::*;
use crate::conformance::{World, conforms};

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

/// A folder, read as a directory or by the road of a bucket.
struct Folder {
    root: TempDir,
    is_bucket: bool,
    prefix: &'static str,
}

impl Folder {
    fn new(is_bucket: bool) -> Self {
        Self {
            root: TempDir::new().unwrap_or_else(|e| panic!("{e}")),
            is_bucket,
            prefix: "in",
        }
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.root.path().join(path);
        let folder = path.parent().unwrap_or(&path);
        fs::create_dir_all(folder).unwrap_or_else(|e| panic!("{e}"));
        fs::write(path, text).unwrap_or_else(|e| panic!("{e}"));
    }

    fn objects(&self, format: Option<Format>) -> Objects {
        let (root, stop) = (self.root.path().to_owned(), object::Stop::new());
        let bucket = || {
            let config = StorageConfig::directory(StorageUrl::File(root.clone()));
            let storage = Storage::open(&config).unwrap_or_else(|e| panic!("{e}"));
            let fetching = Fetching {
                key: "1/test".to_owned(),
                fetcher: Arc::new(Fetcher::new(Arc::new(Unbounded::default()))),
                directory: None,
                counters: Arc::default(),
            };
            let objects = object::Objects::new(storage, "", fetching, &stop);
            Root::Bucket(objects.unwrap_or_else(|e| panic!("{e}")))
        };
        Objects {
            root: match self.is_bucket {
                true => bucket(),
                false => Root::Directory {
                    path: root,
                    confined: true,
                },
            },
            stop,
            prefix: self.prefix.to_owned(),
            spec: Spec {
                format,
                options: Options::default(),
                max_record_bytes: 1 << 20,
            },
        }
    }

    fn fetch(&self) -> FileFetch {
        FileFetch::with_pause(self.objects(None), Duration::ZERO)
    }
}

#[async_trait]
impl World for Folder {
    async fn make(&mut self, name: &str, records: &[String]) -> String {
        let path = format!("in/{name}.ndjson");
        self.write(&path, &records.join("\n"));
        path
    }

    async fn splits(&mut self) -> Box<dyn Splits> {
        Box::new(self.objects(None))
    }

    async fn fetch(&mut self) -> Box<dyn Fetch> {
        Box::new(Folder::fetch(self))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_conform() {
    conforms(&mut Folder::new(false)).await;
    conforms(&mut Folder::new(true)).await;
}

async fn ids(folder: &Folder, format: Option<Format>) -> String {
    let splits = folder.objects(format).list().await;
    let splits = splits.unwrap_or_else(|e| panic!("{e}"));
    assert!(splits.iter().all(|split| split.closed));
    let ids: Vec<String> = splits.into_iter().map(|split| split.id).collect();
    ids.join(" ")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_data_is_no_split() {
    for is_bucket in [false, true] {
        let mut folder = Folder::new(is_bucket);
        // Nothing has come yet.
        assert_eq!(ids(&folder, None).await, "");
        for path in [
            "in/a.csv",
            "in/b.json",
            "in/day=1/b.ndjson",
            "in/_day=1/c.csv",
            "in/_SUCCESS",
            "in/.a.csv.crc",
            "in/_tmp/d.csv",
            "in/e.txt",
            // A data file of a project in the same storage.
            "in/01a2008b-f1f7-706c-b143-85ee123f35d7.parquet",
            "other/f.csv",
        ] {
            folder.write(path, "a\n1\n");
        }
        let all = "in/_day=1/c.csv in/a.csv in/b.json in/day=1/b.ndjson";
        assert_eq!(ids(&folder, None).await, all);
        assert_eq!(
            ids(&folder, Some(Format::Csv)).await,
            "in/_day=1/c.csv in/a.csv in/e.txt"
        );
        // As for attach_files: the two are one.
        assert_eq!(
            ids(&folder, Some(Format::Ndjson)).await,
            "in/b.json in/day=1/b.ndjson in/e.txt"
        );
        folder.prefix = "";
        assert_eq!(ids(&folder, None).await, format!("{all} other/f.csv"));
        folder.prefix = "in/*.csv";
        assert_eq!(ids(&folder, None).await, "in/a.csv");
        let latest = folder.objects(None).locate(&[], &Start::Latest).await;
        assert!(latest.is_err());
        folder.prefix = "none";
        assert_eq!(ids(&folder, None).await, "");
        let mut objects = folder.objects(None);
        fs::remove_dir_all(folder.root.path()).unwrap_or_else(|e| panic!("{e}"));
        let missing = objects.list().await;
        assert!(missing.is_err_and(|e| e.is_retryable()));
    }
}

async fn polled(fetch: &mut FileFetch) -> Batch {
    let batch = fetch.poll(&Limits::default()).await;
    let batch = batch.unwrap_or_else(|e| panic!("{e}"));
    fetch.ack(&batch);
    batch
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_is_bounded_by_what_its_rows_are_written_out() {
    let folder = Folder::new(false);
    folder.write("in/a.parquet", "");
    // One long text, which the file has once.
    let texts = StringArray::from(vec!["x".repeat(60_000)]);
    let keys = Int32Array::from(vec![0; 30_000]);
    let column: ArrayRef =
        Arc::new(DictionaryArray::try_new(keys, Arc::new(texts)).unwrap_or_else(|e| panic!("{e}")));
    let rows = RecordBatch::try_from_iter([("text", column)]).unwrap_or_else(|e| panic!("{e}"));
    let file = fs::File::create(folder.root.path().join("in/a.parquet"));
    let file = file.unwrap_or_else(|e| panic!("{e}"));
    let writer = ArrowWriter::try_new(file, rows.schema(), None);
    let mut writer = writer.unwrap_or_else(|e| panic!("{e}"));
    writer.write(&rows).unwrap_or_else(|e| panic!("{e}"));
    writer.close().unwrap_or_else(|e| panic!("{e}"));

    let mut fetch = folder.fetch();
    open(&mut fetch, "in/a.parquet", Position::Beginning).await;
    let batch = polled(&mut fetch).await;
    let records: u64 = batch.moves.iter().map(|moved| moved.records).sum();
    assert!((1..1_000).contains(&records), "{records}");
    let mut all = records;
    while all < 30_000 {
        all += polled(&mut fetch)
            .await
            .moves
            .iter()
            .map(|moved| moved.records)
            .sum::<u64>();
    }
    assert_eq!(all, 30_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_object_is_read_by_as_few_rows_as_a_batch_may_have() {
    let folder = Folder::new(false);
    let events: Vec<String> = (0..10).map(|n| format!("{{\"n\":{n}}}")).collect();
    folder.write("in/a.ndjson", &events.join("\n"));
    folder.write("in/b.json", &format!("[{}]", events.join(", ")));
    folder.write("in/c.csv", "n\n0\n1\n2\n3\n4\n5\n6\n7\n8\n9\n");
    let column: ArrayRef = Arc::new(Int32Array::from((0..10).collect::<Vec<i32>>()));
    let rows = RecordBatch::try_from_iter([("n", column)]).unwrap_or_else(|e| panic!("{e}"));
    let file = fs::File::create(folder.root.path().join("in/d.parquet"));
    let file = file.unwrap_or_else(|e| panic!("{e}"));
    let writer = ArrowWriter::try_new(file, rows.schema(), None);
    let mut writer = writer.unwrap_or_else(|e| panic!("{e}"));
    writer.write(&rows).unwrap_or_else(|e| panic!("{e}"));
    writer.close().unwrap_or_else(|e| panic!("{e}"));

    let limits = Limits {
        records: 3,
        ..Limits::default()
    };
    for path in ["in/a.ndjson", "in/b.json", "in/c.csv", "in/d.parquet"] {
        let (mut at, mut read, mut ended) = (Position::Beginning, 0, false);
        while !ended {
            // Another process goes on with it each time.
            let mut fetch = folder.fetch();
            open(&mut fetch, path, at.clone()).await;
            let batch = fetch.poll(&limits).await.unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(batch.stops, []);
            let moved = &batch.moves[0];
            assert!(moved.records <= 3, "{path}: {}", moved.records);
            assert!(moved.records > 0 || moved.ended, "{path} goes on");
            read += moved.records;
            ended = moved.ended;
            at = moved.to.clone();
        }
        assert_eq!(read, 10, "{path}");
    }
}

async fn open(fetch: &mut FileFetch, path: &str, from: Position) {
    let opened = fetch.open(path, from).await;
    opened.unwrap_or_else(|e| panic!("{path}: {e}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_object_ends_changes_or_goes() {
    for is_bucket in [false, true] {
        let folder = Folder::new(is_bucket);
        folder.write("in/a.csv", "x\n1\n2\n");
        folder.write("in/b.csv", "x\n3\n");
        folder.write("in/bad.avro", "Obj");
        let mut fetch = folder.fetch();
        for path in ["in/a.csv", "in/b.csv", "in/bad.avro", "in/gone.csv"] {
            open(&mut fetch, path, Position::Beginning).await;
        }
        // Small ones come together, each with its end.
        let batch = polled(&mut fetch).await;
        let moves: Vec<_> = batch.moves.iter().map(|m| (m.records, m.ended)).collect();
        assert_eq!(moves, [(2, true), (1, true)]);
        let read = batch.moves[0].to.clone();
        assert_eq!(read.next_offset().as_deref(), Some("2"));
        assert!(matches!(batch.stops[0].reason, StopReason::Unreadable(_)));
        let stop = polled(&mut fetch).await.stops.remove(0);
        assert_eq!(stop.reason, StopReason::Gone);
        // Another file under the same name is not the one that was begun.
        folder.write("in/a.csv", "x\n1\n2\n3\n");
        let mut fetch = folder.fetch();
        open(&mut fetch, "in/a.csv", read).await;
        let stop = polled(&mut fetch).await.stops.remove(0);
        assert_eq!(stop.reason, StopReason::Changed);
        assert!(fetch.open("in/a.csv", Position::offset(1)).await.is_err());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_cannot_be_read_holds_up_no_others() {
    // Root may read everything.
    let folder = Folder::new(false);
    folder.write("in/a.csv", "x\n1\n");
    folder.write("in/b.csv", "x\n2\n");
    let locked = folder.root.path().join("in/a.csv");
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o0)).unwrap_or_else(|e| panic!("{e}"));
    if fs::read(&locked).is_err() {
        let mut fetch = folder.fetch();
        open(&mut fetch, "in/a.csv", Position::Beginning).await;
        open(&mut fetch, "in/b.csv", Position::Beginning).await;
        let stop = polled(&mut fetch).await.stops.remove(0);
        assert_eq!(stop.split, "in/a.csv");
        assert_eq!(polled(&mut fetch).await.moves[0].split, "in/b.csv");
    }

    // One that the storage does not give, and one that it does.
    let error = || {
        Fault::Trouble(SourceError::Unreachable {
            action: "read an object",
            reason: "not now".to_owned(),
        })
    };
    let mut fetch = folder.fetch();
    for path in ["in/a.csv", "in/b.csv"] {
        open(&mut fetch, path, Position::Beginning).await;
    }
    let at = |path: &str| (path.to_owned(), Position::Beginning);
    let fail = |fetch: &mut FileFetch, path: &str| {
        let mut batch = Batch::default();
        fetch.hear(at(path), Err(error()), &mut batch);
        batch
    };
    // An outage is one of all: nothing stops, however long it takes.
    for _ in 0..3 * MOST_FAILURES {
        for path in ["in/a.csv", "in/b.csv"] {
            let batch = fail(&mut fetch, path);
            assert!(batch.trouble.is_some() && batch.stops.is_empty());
        }
    }
    fetch.rewind().await.unwrap_or_else(|e| panic!("{e}"));
    let mut batch = Batch::default();
    fetch.hear(at("in/b.csv"), Ok(None), &mut batch);
    assert!(batch.moves[0].ended);
    let stopped = fail(&mut fetch, "in/a.csv").stops;
    assert_eq!(stopped[0].split, "in/a.csv");
    assert!(stopped[0].reason.to_string().contains("not now"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_nothing_to_read_a_poll_takes_its_time() {
    let folder = Folder::new(false);
    fs::remove_dir_all(folder.root.path()).unwrap_or_else(|e| panic!("{e}"));
    let mut fetch = FileFetch::new(folder.objects(None));
    let limits = Limits {
        wait: Duration::from_millis(50),
        ..Limits::default()
    };
    for is_open in [false, true] {
        if is_open {
            open(&mut fetch, "in/a.csv", Position::Beginning).await;
        }
        let begun = Instant::now();
        let batch = fetch.poll(&limits).await.unwrap_or_else(|e| panic!("{e}"));
        assert!(batch.is_empty());
        assert_eq!(batch.trouble.is_some(), is_open);
        assert!(begun.elapsed() >= limits.wait);
    }
}
