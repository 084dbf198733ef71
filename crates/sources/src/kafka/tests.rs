use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::sleep;
use std::time::Duration;

use async_trait::async_trait;

use super::fetch::Fetcher;
use super::reader::Reader;
use super::topics::Topics;
use super::{Ask, Broker, Failure, Message, Partition};
use crate::batch::{Batch, Limits, Move, Stop};
use crate::conformance::{World, conforms};
use crate::error::{SourceError, StopReason};
use crate::position::Position;
use crate::source::{Ends, Fetch, Lag, Split, Splits, Start, lag_now};

const LIMITS: Limits = Limits {
    bytes: 1 << 20,
    records: 100,
    wait: Duration::from_millis(5),
};

/// A record of a log: None is a transaction's marker.
type Entry = Option<(i64, Option<Vec<u8>>)>;

#[derive(Default)]
struct Log {
    /// Offset of the first entry.
    base: i64,
    entries: Vec<Entry>,
    /// The offset of an entry that cannot be read.
    corrupt: Option<i64>,
}

impl Log {
    fn end(&self) -> i64 {
        self.base + self.entries.len() as i64
    }
}

#[derive(Default)]
struct State {
    logs: BTreeMap<Partition, Log>,
    down: bool,
    /// Questions for ends are answered later.
    hesitates: bool,
}

/// A cluster in memory, with what librdkafka does to a position outside of a log.
#[derive(Clone, Default)]
struct Cluster(Arc<Mutex<State>>);

impl Cluster {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no test panics while it holds this")
    }

    fn write(&self, split: &str, time_ms: i64, value: Option<&str>) {
        let entry = Some((time_ms, value.map(|v| v.as_bytes().to_vec())));
        self.log(split, |log| log.entries.push(entry));
    }

    fn log(&self, split: &str, change: impl FnOnce(&mut Log)) {
        let partition = Partition::parse(split).unwrap_or_else(|e| panic!("{e}"));
        change(self.state().logs.entry(partition).or_default());
    }

    fn remove(&self, split: &str) {
        let partition = Partition::parse(split).unwrap_or_else(|e| panic!("{e}"));
        self.state().logs.remove(&partition);
    }

    fn client(&self) -> FakeClient {
        FakeClient {
            cluster: self.clone(),
            assigned: Vec::new(),
            before: HashMap::new(),
            fails_to_unassign: false,
            waits: false,
            turn: 0,
        }
    }

    fn reader(&self) -> Reader<FakeClient> {
        Reader::new(self.client(), Duration::ZERO)
    }
}

struct Assigned {
    partition: Partition,
    next: Option<i64>,
    /// Something of it was shown, or passed over.
    shown: bool,
    paused: bool,
    given_up: bool,
}

struct FakeClient {
    cluster: Cluster,
    assigned: Vec<Assigned>,
    /// Where partitions were when they were given up: what librdkafka may tell of them until something is shown.
    before: HashMap<Partition, i64>,
    fails_to_unassign: bool,
    /// Nothing has arrived yet of what is assigned.
    waits: bool,
    turn: usize,
}

impl Broker for FakeClient {
    fn assign(&mut self, partitions: &[(Partition, Option<i64>)]) -> Result<(), Failure> {
        for (partition, next) in partitions {
            assert!(self.assigned.iter().all(|a| a.partition != *partition));
            self.assigned.push(Assigned {
                partition: partition.clone(),
                next: *next,
                shown: false,
                paused: false,
                given_up: false,
            });
        }
        Ok(())
    }

    fn unassign(&mut self, partition: &Partition) -> Result<(), Failure> {
        if self.fails_to_unassign {
            return Err(Failure::Transient("it does not".to_owned()));
        }
        let place = self.assigned.iter().position(|a| a.partition == *partition);
        let given_up = self
            .assigned
            .remove(place.expect("only what is assigned is given up"));
        if let (Some(next), true) = (given_up.next, given_up.shown) {
            self.before.insert(given_up.partition, next);
        }
        Ok(())
    }

    fn unassign_all(&mut self) -> Result<(), Failure> {
        let all: Vec<_> = self.assigned.iter().map(|a| a.partition.clone()).collect();
        all.iter()
            .try_for_each(|partition| self.unassign(partition))
    }

    fn positions(&mut self) -> Result<Vec<(Partition, Option<i64>)>, Failure> {
        let of = |assigned: &Assigned| {
            let position = match assigned.shown {
                true => assigned.next,
                false => self.before.get(&assigned.partition).copied(),
            };
            (assigned.partition.clone(), position)
        };
        Ok(self.assigned.iter().map(of).collect())
    }

    fn pause(&mut self, partition: &Partition, paused: bool) -> Result<(), Failure> {
        for assigned in &mut self.assigned {
            if assigned.partition == *partition {
                assigned.paused = paused;
            }
        }
        Ok(())
    }

    fn ends(&mut self, partition: &Partition) -> Result<(i64, i64), Failure> {
        let state = self.cluster.state();
        if state.down {
            return Err(Failure::Transient("down".to_owned()));
        }
        let log = state.logs.get(partition);
        let log = log.ok_or_else(|| Failure::Unknown("unknown".to_owned()))?;
        Ok((log.base, log.end()))
    }

    fn asker(&self) -> Arc<dyn Ask> {
        Arc::new(self.cluster.clone())
    }

    fn poll(&mut self, wait: Duration, take: &mut dyn FnMut(Message<'_>)) -> Result<bool, Failure> {
        let cluster = self.cluster.clone();
        let state = cluster.state();
        if state.down {
            return Err(Failure::Transient("down".to_owned()));
        }
        let count = self.assigned.len();
        for step in 0..count {
            let at = (self.turn + step) % count;
            let assigned = &mut self.assigned[at];
            if self.waits || assigned.paused || assigned.given_up {
                continue;
            }
            let Some(log) = state.logs.get(&assigned.partition) else {
                assigned.given_up = true;
                return Err(Failure::Unknown("unknown".to_owned()));
            };
            let next = assigned.next.unwrap_or(log.base);
            if next < log.base || next > log.end() {
                assigned.given_up = true;
                return Err(Failure::Partitions("outside".to_owned()));
            }
            for (place, entry) in log
                .entries
                .iter()
                .enumerate()
                .skip((next - log.base) as usize)
            {
                let offset = log.base + place as i64;
                assigned.next = Some(offset + 1);
                assigned.shown = true;
                if log.corrupt == Some(offset) {
                    return Err(Failure::Partitions("corrupt".to_owned()));
                }
                if let Some((time, value)) = entry {
                    self.turn = at + 1;
                    take(Message {
                        topic: &assigned.partition.topic,
                        partition: assigned.partition.number,
                        offset,
                        timestamp_ms: Some(*time),
                        value: value.as_deref(),
                        collection: None,
                        mark: None,
                    });
                    return Ok(true);
                }
            }
        }
        drop(state);
        sleep(wait.min(Duration::from_millis(1)));
        Ok(false)
    }
}

impl Ask for Cluster {
    fn ends(&self, partitions: &[Partition]) -> Result<Vec<(i64, i64)>, Failure> {
        while self.state().hesitates {
            sleep(Duration::from_millis(1));
        }
        let mut client = self.client();
        partitions
            .iter()
            .map(|partition| Broker::ends(&mut client, partition))
            .collect()
    }
}

struct FakeSplits(Cluster);

#[async_trait]
impl Splits for FakeSplits {
    async fn list(&mut self) -> Result<Vec<Split>, SourceError> {
        let mut topics: BTreeMap<String, Vec<i32>> = BTreeMap::new();
        for partition in self.0.state().logs.keys() {
            let numbers = topics.entry(partition.topic.clone()).or_default();
            numbers.push(partition.number);
        }
        let topics: Vec<_> = topics.into_iter().collect();
        Ok(Topics::parse(["^."])?.splits(&topics))
    }

    async fn locate(
        &mut self,
        splits: &[Split],
        _start: &Start,
    ) -> Result<Vec<Position>, SourceError> {
        Ok(vec![Position::Beginning; splits.len()])
    }
}

#[async_trait]
impl World for Cluster {
    async fn make(&mut self, name: &str, records: &[String]) -> String {
        let split = format!("topic/{}", name.as_bytes()[0] - b'a');
        for record in records {
            self.write(&split, 5, Some(record));
            // As after a transaction of one record.
            self.log(&split, |log| log.entries.push(None));
        }
        split
    }

    async fn splits(&mut self) -> Box<dyn Splits> {
        Box::new(FakeSplits(self.clone()))
    }

    async fn fetch(&mut self) -> Box<dyn Fetch> {
        Box::new(Fetcher::new(self.reader()))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kafka_conforms() {
    conforms(&mut Cluster::default()).await;
}

/// What is behind what was read of a split.
fn lag(reader: &mut Reader<FakeClient>, split: &str) -> Option<Lag> {
    let (asker, partitions) = reader.asker();
    let ends = asker.ends(&partitions).unwrap_or_else(|e| panic!("{e:?}"));
    let splits = partitions.iter().map(Partition::split);
    let offsets = splits.zip(ends).collect();
    reader.lag(split, &Ends { offsets })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_are_read_while_ends_are_asked_for() {
    let mut cluster = Cluster::default();
    let split = cluster.make("a", &[]).await;
    let mut fetch = cluster.fetch().await;
    let opened = fetch.open(&split, Position::Beginning).await;
    opened.unwrap_or_else(|e| panic!("{e}"));
    cluster.log(&split, |_| {});
    cluster.state().hesitates = true;
    let asked = tokio::spawn(fetch.ask_ends());
    cluster.write(&split, 1, Some("one"));
    let batch = fetch.poll(&LIMITS).await;
    assert_eq!(batch.map(|batch| batch.records().len()), Ok(1));
    assert!(!asked.is_finished());
    cluster.write(&split, 1, Some("two"));
    cluster.state().hesitates = false;
    let ends = asked.await.unwrap_or_else(|e| panic!("{e}"));
    let ends = ends.unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(fetch.lag(&split, &ends), Some(Lag::Records(1)));
    // Of what was not asked about nothing is known.
    assert_eq!(fetch.lag("topic/9", &ends), None);
    cluster.state().down = true;
    assert!(lag_now(&mut *fetch, &split).await.is_err());
}

fn poll(reader: &mut Reader<FakeClient>) -> Batch {
    let batch = reader.poll(&LIMITS).unwrap_or_else(|e| panic!("{e}"));
    reader.delivered();
    reader.ack(&batch);
    batch
}

fn open(reader: &mut Reader<FakeClient>, split: &str, from: Position) {
    reader.open(split, from).unwrap_or_else(|e| panic!("{e}"));
}

fn values(batch: &Batch) -> Vec<String> {
    let of = |r| {
        batch
            .value(r)
            .map_or("-".into(), |v| String::from_utf8_lossy(v).into_owned())
    };
    batch.records().iter().map(of).collect()
}

fn stops(batch: &Batch) -> Vec<(&str, &StopReason)> {
    batch
        .stops
        .iter()
        .map(|s| (s.split.as_str(), &s.reason))
        .collect()
}

/// What comes until nothing more does. A poll takes one message at least, however slow the machine is; of one partition it may
/// be the one that only shows that it is still the same.
#[derive(Default)]
struct Read {
    values: Vec<String>,
    stops: Vec<Stop>,
    moves: Vec<Move>,
}

fn read(reader: &mut Reader<FakeClient>) -> Read {
    let (mut read, mut idle) = (Read::default(), 0);
    while idle < 4 {
        let batch = poll(reader);
        let quiet = batch.is_empty() && batch.trouble.is_none();
        idle = if quiet { idle + 1 } else { 0 };
        read.values.extend(values(&batch));
        read.stops.extend(batch.stops);
        read.moves.extend(batch.moves);
    }
    read.stops.sort_by(|a, b| a.split.cmp(&b.split));
    read
}

/// Two records read, and the position behind them.
fn read_two(cluster: &Cluster) -> Position {
    for (time, value) in [(1, "one"), (2, "two")] {
        cluster.write("t/0", time, Some(value));
    }
    let mut reader = cluster.reader();
    open(&mut reader, "t/0", Position::Beginning);
    let read = read(&mut reader);
    assert_eq!(read.values, ["one", "two"]);
    read.moves[read.moves.len() - 1].to.clone()
}

#[test]
fn reading_goes_on_behind_the_mark() {
    let cluster = Cluster::default();
    let position = read_two(&cluster);
    assert_eq!(position.next_offset().as_deref(), Some("2"));
    cluster.write("t/0", 3, None);
    let mut reader = cluster.reader();
    open(&mut reader, "t/0", position.clone());
    let third = read(&mut reader);
    assert_eq!((third.values, third.stops), (vec!["-".to_owned()], vec![]));
    let moved = &third.moves[0];
    assert_eq!(moved.from, position);
    assert_eq!((moved.records, moved.timestamp_ms), (1, Some(3)));
    cluster.write("t/0", 4, Some("x"));
    assert_eq!(lag(&mut reader, "t/0"), Some(Lag::Records(1)));
    // A record that compaction took away marks nothing.
    let cluster = Cluster::default();
    let position = read_two(&cluster);
    cluster.log("t/0", |log| log.entries[1] = None);
    cluster.write("t/0", 3, Some("three"));
    let mut reader = cluster.reader();
    open(&mut reader, "t/0", position);
    assert_eq!(read(&mut reader).values, ["three"]);
}

#[test]
fn a_topic_made_anew_stops() {
    // Shorter than what was read,
    let cluster = Cluster::default();
    let position = read_two(&cluster);
    cluster.remove("t/0");
    cluster.write("t/0", 1, Some("one"));
    let mut reader = cluster.reader();
    open(&mut reader, "t/0", position.clone());
    let expected = StopReason::Shorter { next: 2, end: 1 };
    assert_eq!(stops(&poll(&mut reader)), [("t/0", &expected)]);
    // as long,
    cluster.write("t/0", 2, Some("other"));
    cluster.write("t/0", 3, Some("three"));
    let mut reader = cluster.reader();
    open(&mut reader, "t/0", position.clone());
    let batch = poll(&mut reader);
    assert_eq!(stops(&batch), [("t/0", &StopReason::Recreated { next: 2 })]);
    assert_eq!(values(&batch), [""; 0]);
    // or with the same record at another time.
    cluster.remove("t/0");
    cluster.write("t/0", 8, Some("one"));
    cluster.write("t/0", 9, Some("two"));
    let mut reader = cluster.reader();
    open(&mut reader, "t/0", position);
    assert_eq!(stops(&poll(&mut reader)).len(), 1);
    // Nothing more comes of it.
    cluster.write("t/0", 9, Some("two"));
    assert!(poll(&mut reader).is_empty());
}

#[test]
fn what_was_deleted_before_it_was_read_stops() {
    let cluster = Cluster::default();
    let position = read_two(&cluster);
    for time in 3..9 {
        cluster.write("t/0", time, Some("x"));
    }
    // The record of the mark may go,
    let trim = |to: i64| {
        cluster.log("t/0", |log| {
            log.entries.drain(..(to - log.base) as usize);
            log.base = to;
        });
    };
    trim(2);
    let mut reader = cluster.reader();
    open(&mut reader, "t/0", position.clone());
    assert_eq!(read(&mut reader).values.len(), 6);
    // what is behind it may not.
    trim(4);
    let mut reader = cluster.reader();
    open(&mut reader, "t/0", position);
    let expected = StopReason::Truncated { next: 2, oldest: 4 };
    assert_eq!(stops(&poll(&mut reader)), [("t/0", &expected)]);
    // A new source begins with what there is.
    open(&mut reader, "t/0", Position::Beginning);
    assert_eq!(read(&mut reader).values.len(), 4);
}

#[test]
fn a_position_moves_over_what_is_no_record() {
    let cluster = Cluster::default();
    let log = |change: &dyn Fn(&mut Log)| cluster.log("t/0", change);
    // A transaction of two records with its marker, and one that was aborted.
    for value in ["one", "two"] {
        cluster.write("t/0", 1, Some(value));
    }
    log(&|log| log.entries.push(None));
    let mut reader = cluster.reader();
    open(&mut reader, "t/0", Position::Beginning);
    let first = read(&mut reader);
    assert_eq!(first.values, ["one", "two"]);
    assert_eq!(lag(&mut reader, "t/0"), Some(Lag::Records(0)));
    log(&|log| log.entries.extend([None, None, None]));
    let aborted = read(&mut reader);
    assert_eq!(aborted.moves.len(), 1);
    assert_eq!(aborted.moves[0].from, first.moves[first.moves.len() - 1].to);
    assert_eq!(aborted.moves[0].records, 0);
    assert_eq!(lag(&mut reader, "t/0"), Some(Lag::Records(0)));
    let end = aborted.moves[0].to.clone();
    assert_eq!(end.next_offset().as_deref(), Some("6"));
    // The record before is still known again.
    assert!(matches!(end, Position::Offset { mark: Some(mark), .. } if mark.offset == 1));
    // All of it is deleted: nothing was lost.
    log(&|log| {
        *log = Log {
            base: 6,
            ..Log::default()
        }
    });
    cluster.write("t/0", 2, Some("three"));
    let mut reader = cluster.reader();
    open(&mut reader, "t/0", end);
    let read = read(&mut reader);
    assert_eq!(
        (read.values, read.stops),
        (vec!["three".to_owned()], vec![])
    );
}

#[test]
fn what_was_not_stored_is_read_again_though_the_broker_was_further() {
    let cluster = Cluster::default();
    for n in 0..3 {
        cluster.write("t/0", n, Some("x"));
        cluster.log("t/0", |log| log.entries.push(None));
    }
    let mut reader = cluster.reader();
    open(&mut reader, "t/0", Position::Beginning);
    let unstored = reader.poll(&LIMITS).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(unstored.records().len(), 3);
    reader.delivered();
    reader.rewind();
    reader.broker().waits = true;
    assert!(poll(&mut reader).is_empty());
    reader.broker().waits = false;
    assert_eq!(read(&mut reader).values.len(), 3);
    // The same when the broker does not let go at first: nothing comes twice, and nothing is missed.
    cluster.write("t/0", 9, Some("y"));
    let unstored = reader.poll(&LIMITS).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(unstored.records().len(), 1);
    reader.delivered();
    reader.broker().fails_to_unassign = true;
    reader.rewind();
    for _ in 0..2 {
        let batch = poll(&mut reader);
        assert!(batch.is_empty() && batch.trouble.is_some());
    }
    reader.broker().fails_to_unassign = false;
    assert_eq!(read(&mut reader).values, ["y"]);
    // Nor does a split that is closed bring anything.
    reader.broker().fails_to_unassign = true;
    assert_eq!(reader.close("t/0"), Ok(()));
    cluster.write("t/0", 9, Some("z"));
    assert!(values(&poll(&mut reader)).is_empty());
    reader.broker().fails_to_unassign = false;
    assert!(read(&mut reader).values.is_empty());
}

#[test]
fn one_partition_stops_and_others_go_on() {
    let cluster = Cluster::default();
    for split in ["t/0", "t/1", "u/0"] {
        cluster.write(split, 1, Some("one"));
    }
    let mut reader = cluster.reader();
    for split in ["t/0", "t/1", "u/0"] {
        open(&mut reader, split, Position::Beginning);
    }
    assert_eq!(read(&mut reader).values.len(), 3);
    // While it runs: a topic goes, another is trimmed beyond what was read.
    cluster.remove("u/0");
    cluster.log("t/1", |log| {
        log.base = 7;
        log.entries = vec![Some((2, None))];
    });
    cluster.write("t/0", 2, Some("two"));
    let rest = read(&mut reader);
    assert_eq!(rest.values, ["two"]);
    let reasons: Vec<_> = rest
        .stops
        .iter()
        .map(|s| (s.split.as_str(), &s.reason))
        .collect();
    let truncated = StopReason::Truncated { next: 1, oldest: 7 };
    assert_eq!(reasons, [("t/1", &truncated), ("u/0", &StopReason::Gone)]);
    cluster.write("t/0", 3, Some("three"));
    assert_eq!(read(&mut reader).values, ["three"]);
}

#[test]
fn a_partition_is_gone_only_after_a_while() {
    let cluster = Cluster::default();
    let position = read_two(&cluster);
    cluster.remove("t/0");
    let mut reader = Reader::new(cluster.client(), Duration::from_secs(3600));
    open(&mut reader, "t/0", position);
    for _ in 0..3 {
        let batch = poll(&mut reader);
        assert!(batch.trouble.is_some() && batch.stops.is_empty());
    }
    let position = read_two(&cluster);
    assert!(matches!(position, Position::Offset { next: 2, .. }));
    assert_eq!(poll(&mut reader).trouble, None);
}

#[test]
fn an_outage_is_trouble_and_passes() {
    let cluster = Cluster::default();
    cluster.write("t/0", 1, Some("one"));
    cluster.state().down = true;
    let mut reader = cluster.reader();
    open(&mut reader, "t/0", Position::Beginning);
    let batch = poll(&mut reader);
    assert!(batch.is_empty());
    assert_eq!(batch.trouble.map(|e| e.sqlstate()), Some("58030"));
    cluster.state().down = false;
    assert_eq!(values(&poll(&mut reader)), ["one"]);
    cluster.state().down = true;
    assert!(poll(&mut reader).trouble.is_some());
    cluster.state().down = false;
    cluster.write("t/0", 2, Some("two"));
    let batch = poll(&mut reader);
    assert_eq!(
        (values(&batch), batch.trouble),
        (vec!["two".to_owned()], None)
    );
}

#[test]
fn what_cannot_be_read_is_not_passed_over() {
    let cluster = Cluster::default();
    for value in ["one", "two", "three"] {
        cluster.write("t/0", 1, Some(value));
    }
    cluster.log("t/0", |log| log.corrupt = Some(1));
    let mut reader = cluster.reader();
    open(&mut reader, "t/0", Position::Beginning);
    let (mut found, mut troubles) = (Vec::new(), 0);
    for _ in 0..8 {
        let batch = poll(&mut reader);
        assert!(batch.stops.is_empty());
        troubles += u32::from(batch.trouble.is_some());
        found.extend(values(&batch));
    }
    assert_eq!(found, ["one"]);
    assert!(troubles > 1);
    cluster.log("t/0", |log| log.corrupt = None);
    assert_eq!(read(&mut reader).values, ["two", "three"]);
}

#[test]
fn a_batch_is_bounded() {
    let cluster = Cluster::default();
    for n in 0..50 {
        cluster.write("t/0", n, Some("0123456789"));
    }
    let mut reader = cluster.reader();
    open(&mut reader, "t/0", Position::Beginning);
    let mut all = 0;
    while all < 50 {
        let limits = Limits {
            bytes: 95,
            ..LIMITS
        };
        let batch = reader.poll(&limits).unwrap_or_else(|e| panic!("{e}"));
        reader.delivered();
        assert!((1..=10).contains(&batch.records().len()));
        all += batch.records().len();
    }
    for wrong in ["t", "t/x"] {
        assert!(reader.open(wrong, Position::Beginning).is_err());
    }
    assert!(reader.open("t/0", Position::Time(1)).is_err());
}
