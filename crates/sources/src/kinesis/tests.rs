use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;

use super::aggregate::tests::pack;
use super::reader::{Pace, Reader};
use super::{Answer, Failure, Raw, Shard, Stream, located};
use crate::batch::{Batch, Limits, Stop};
use crate::conformance::{World, conforms};
use crate::error::{SourceError, StopReason};
use crate::position::Position;
use crate::source::{Ends, Fetch, Lag, Split, Splits, Start, lag_now};

const LIMITS: Limits = Limits {
    bytes: 1 << 20,
    records: 100,
    wait: Duration::from_millis(5),
};
const PACE: Pace = Pace {
    pause: Duration::ZERO,
    backoff: Duration::ZERO,
    backoff_most: Duration::ZERO,
};

/// Where an iterator is that brings nothing.
const STALLED: usize = usize::MAX;

#[derive(Default)]
struct Data {
    records: Vec<Raw>,
    parents: Vec<String>,
    closed: bool,
    /// Whether answers name the children.
    tells_children: bool,
    hashes: Option<(u128, u128)>,
    /// So many records were deleted, the oldest first.
    trimmed: usize,
    /// Whether iterators at those bring nothing, instead of the oldest record.
    stalls: bool,
}

#[derive(Default)]
struct State {
    shards: BTreeMap<String, Data>,
    /// Iterators before this one have expired.
    valid_from: usize,
    iterators: Vec<(String, usize)>,
    /// So many answers bring nothing yet.
    gaps: usize,
    /// What the next requests for records answer instead.
    faults: Vec<Failure>,
    /// What the next requests for the shards do.
    list_faults: Vec<Failure>,
}

/// A stream in memory.
#[derive(Clone, Default)]
struct FakeStream(Arc<Mutex<State>>);

impl FakeStream {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no test panics while it holds this")
    }

    fn write(&self, shard: &str, data: &[u8]) {
        let mut state = self.state();
        let records = &mut state.shards.entry(shard.to_owned()).or_default().records;
        let sequence = format!("4950{:020}", records.len());
        records.push(Raw {
            sequence,
            arrived_ms: Some(records.len() as i64),
            data: data.to_vec(),
        });
    }

    fn change(&self, shard: &str, change: impl FnOnce(&mut Data)) {
        change(self.state().shards.entry(shard.to_owned()).or_default());
    }

    /// It takes records for deleted whenever they may be.
    fn reader(&self) -> Reader<Self> {
        Reader::new(self.clone(), PACE, Duration::ZERO)
    }

    fn sequence(&self, shard: &str, record: usize) -> String {
        self.state().shards[shard].records[record].sequence.clone()
    }

    fn expire_iterators(&self) {
        let mut state = self.state();
        state.valid_from = state.iterators.len();
    }
}

#[async_trait]
impl Stream for FakeStream {
    async fn shards(&self) -> Result<Vec<Shard>, Failure> {
        let mut state = self.state();
        if let Some(fault) = state.list_faults.pop() {
            return Err(fault);
        }
        let shard = |(id, data): (&String, &Data)| {
            let (first, last) = data.hashes.unwrap_or((0, u128::MAX));
            Shard {
                split: Split {
                    id: id.clone(),
                    parents: data.parents.clone(),
                    closed: data.closed,
                },
                hashes: first..=last,
            }
        };
        Ok(state.shards.iter().map(shard).collect())
    }

    async fn iterator(&self, shard: &str, position: &Position) -> Result<String, Failure> {
        let mut state = self.state();
        let data = state.shards.get(shard);
        let data = data.ok_or_else(|| Failure::Missing("shard".to_owned()))?;
        let place = |sequence: &String| {
            let found = data.records.iter().position(|r| r.sequence == *sequence);
            found.ok_or_else(|| Failure::Invalid("sequence".to_owned()))
        };
        let at = match position {
            Position::At(sequence) | Position::After(sequence)
                if data.stalls && place(sequence)? < data.trimmed =>
            {
                STALLED
            }
            Position::At(sequence) => place(sequence)?,
            Position::After(sequence) => place(sequence)? + 1,
            Position::Time(time) => data
                .records
                .iter()
                .filter(|r| r.arrived_ms < Some(*time))
                .count(),
            _ => 0,
        };
        state.iterators.push((shard.to_owned(), at));
        Ok((state.iterators.len() - 1).to_string())
    }

    async fn records(&self, iterator: &str, most: usize) -> Result<Answer, Failure> {
        tokio::task::yield_now().await;
        let mut state = self.state();
        if let Some(fault) = state.faults.pop() {
            return Err(fault);
        }
        let number: usize = iterator.parse().unwrap_or(0);
        if number < state.valid_from {
            return Err(Failure::Expired);
        }
        let (shard, at) = state.iterators[number].clone();
        let data = state.shards.get(&shard);
        let data = data.ok_or_else(|| Failure::Missing("shard".to_owned()))?;
        if at == STALLED {
            let next = Some(state.iterators.len().to_string());
            state.iterators.push((shard, at));
            return Ok(Answer {
                next,
                behind_ms: Some(86_400_000),
                ..Answer::default()
            });
        }
        // From the oldest one on that is left.
        let at = at.max(data.trimmed);
        let most = if state.gaps == 0 { most } else { 0 };
        let records: Vec<Raw> = data.records.iter().skip(at).take(most).cloned().collect();
        let end = at + records.len();
        let left = data.records.len() - end;
        let ended = data.closed && left == 0;
        let has_children = ended && data.tells_children;
        let next = (!ended).then(|| state.iterators.len().to_string());
        state.iterators.push((shard, end));
        state.gaps = state.gaps.saturating_sub(1);
        Ok(Answer {
            records,
            next,
            has_children,
            behind_ms: Some(left as u64),
        })
    }
}

struct FakeSplits(FakeStream);

#[async_trait]
impl Splits for FakeSplits {
    async fn list(&mut self) -> Result<Vec<Split>, SourceError> {
        let shards = self.0.shards().await;
        let shards = shards.map_err(|f| f.into_error("list"))?;
        Ok(shards.into_iter().map(|s| s.split).collect())
    }

    async fn locate(
        &mut self,
        splits: &[Split],
        start: &Start,
    ) -> Result<Vec<Position>, SourceError> {
        Ok(located(splits, start, SystemTime::UNIX_EPOCH))
    }
}

#[async_trait]
impl World for FakeStream {
    async fn make(&mut self, name: &str, records: &[String]) -> String {
        let shard = format!("shardId-{name}");
        // Pairs of records in one, which have the same sequence number.
        for pair in records.chunks(2) {
            let pair: Vec<_> = pair.iter().map(|r| ("k", None, r.as_bytes())).collect();
            self.write(&shard, &pack(&pair));
        }
        shard
    }

    async fn splits(&mut self) -> Box<dyn Splits> {
        Box::new(FakeSplits(self.clone()))
    }

    async fn fetch(&mut self) -> Box<dyn Fetch> {
        Box::new(self.reader())
    }
}

#[tokio::test]
async fn kinesis_conforms() {
    conforms(&mut FakeStream::default()).await;
}

async fn open(reader: &mut Reader<FakeStream>, shard: &str, from: Position) {
    reader
        .open(shard, from)
        .await
        .unwrap_or_else(|e| panic!("{e}"));
}

async fn poll(reader: &mut Reader<FakeStream>) -> Batch {
    let batch = reader.poll(&LIMITS).await.unwrap_or_else(|e| panic!("{e}"));
    reader.ack(&batch);
    batch
}

/// The next batch that has anything: one poll may have no time for a second request.
async fn next(reader: &mut Reader<FakeStream>) -> Batch {
    for _ in 0..10 {
        let batch = poll(reader).await;
        if !batch.is_empty() || batch.trouble.is_some() {
            return batch;
        }
    }
    panic!("nothing comes");
}

fn values(batch: &Batch) -> Vec<String> {
    let of = |r| String::from_utf8_lossy(batch.value(r).unwrap_or_default()).into_owned();
    batch.records().iter().map(of).collect()
}

#[tokio::test]
async fn each_position() {
    let stream = FakeStream::default();
    for value in ["a", "b", "c"] {
        stream.write("s", value.as_bytes());
    }
    let b = stream.state().shards["s"].records[1].sequence.clone();
    for (position, expected) in [
        (Position::Beginning, "a b c"),
        (Position::At(b.clone()), "b c"),
        (Position::After(b.clone()), "c"),
        (Position::Time(2), "c"),
        (Position::Time(9), ""),
    ] {
        let mut reader = stream.reader();
        open(&mut reader, "s", position.clone()).await;
        let batch = poll(&mut reader).await;
        assert_eq!(values(&batch).join(" "), expected, "{position:?}");
        if let Some(moved) = batch.moves.first() {
            assert_eq!(moved.from, position);
            assert_eq!(batch.records()[0].offset.to_string().len(), 24);
            assert_eq!(moved.to.next_offset().map(|n| n.len()), Some(24));
        }
        assert_eq!(
            lag_now(&mut reader, "s").await,
            Ok(Some(Lag::Milliseconds(0)))
        );
    }
    let mut reader = stream.reader();
    for wrong in [Position::offset(1), Position::After("x".into())] {
        assert!(reader.open("s", wrong).await.is_err());
    }
}

#[tokio::test]
async fn a_shard_ends_once() {
    for tells_children in [true, false] {
        let stream = FakeStream::default();
        stream.write("s", b"a");
        let mut reader = stream.reader();
        open(&mut reader, "s", Position::Beginning).await;
        assert!(!poll(&mut reader).await.moves[0].ended);
        stream.write("s", b"b");
        stream.change("s", |data| {
            data.closed = true;
            data.tells_children = tells_children;
        });
        let mut ended = Vec::new();
        let mut read = Vec::new();
        for _ in 0..5 {
            let batch = poll(&mut reader).await;
            read.extend(values(&batch));
            ended.extend(
                batch
                    .moves
                    .iter()
                    .filter(|m| m.ended)
                    .map(|m| m.split.clone()),
            );
        }
        assert_eq!((read, ended), (vec!["b".to_owned()], vec!["s".to_owned()]));
    }
}

#[tokio::test]
async fn an_answer_without_next_iterator_is_not_believed_alone() {
    let stream = FakeStream::default();
    stream.write("s", b"a");
    stream.change("s", |data| data.closed = true);
    let mut reader = stream.reader();
    open(&mut reader, "s", Position::Beginning).await;
    let limits = Limits {
        wait: Duration::ZERO,
        ..LIMITS
    };
    let batch = reader.poll(&limits).await.unwrap_or_else(|e| panic!("{e}"));
    reader.ack(&batch);
    assert!(!batch.moves[0].ended);
    // The list says that it is open after all.
    stream.change("s", |data| data.closed = false);
    stream.write("s", b"b");
    let mut read = Vec::new();
    for _ in 0..3 {
        let batch = poll(&mut reader).await;
        assert!(batch.moves.iter().all(|m| !m.ended));
        read.extend(values(&batch));
    }
    assert_eq!(read, ["b"]);
}

#[tokio::test]
async fn failures_pass() {
    let stream = FakeStream::default();
    stream.write("s", b"a");
    let mut reader = stream.reader();
    open(&mut reader, "s", Position::Beginning).await;
    assert_eq!(values(&poll(&mut reader).await), ["a"]);
    stream.write("s", b"b");
    let all = stream.state().iterators.len();
    stream.state().valid_from = all;
    let batch = next(&mut reader).await;
    assert_eq!(
        (values(&batch), &batch.trouble),
        (vec!["b".to_owned()], &None)
    );
    // Being throttled now and then is no trouble; other failures are, and pass.
    stream.write("s", b"c");
    stream.state().faults = vec![Failure::Throttled("t".into())];
    let batch = next(&mut reader).await;
    assert_eq!(
        (values(&batch), &batch.trouble),
        (vec!["c".to_owned()], &None)
    );
    for fault in [
        Failure::Transient("t".into()),
        Failure::Refused("t".into()),
        Failure::Invalid("t".into()),
    ] {
        stream.write("s", b"d");
        stream.state().faults = vec![fault];
        let batch = poll(&mut reader).await;
        assert!(batch.trouble.is_some() && batch.is_empty());
        assert_eq!(values(&poll(&mut reader).await), ["d"]);
    }
    assert_eq!(
        reader.lag("s", &Ends::default()),
        Some(Lag::Milliseconds(0))
    );
    stream.state().faults = vec![Failure::Throttled("t".into()); 5];
    assert!(next(&mut reader).await.trouble.is_some());
    // How far behind it is nobody knows any more.
    assert_eq!(reader.lag("s", &Ends::default()), None);
}

#[tokio::test]
async fn a_stream_made_anew_stops() {
    let stream = FakeStream::default();
    stream.write("s", b"a");
    stream.write("gone", b"a");
    let mut reader = stream.reader();
    open(&mut reader, "s", Position::After("123".into())).await;
    open(&mut reader, "gone", Position::Beginning).await;
    stream.state().shards.remove("gone");
    let mut stops = poll(&mut reader).await.stops;
    stops.extend(poll(&mut reader).await.stops);
    stops.sort_by(|a, b| a.split.cmp(&b.split));
    let reasons: Vec<_> = stops
        .iter()
        .map(|s| (s.split.as_str(), &s.reason))
        .collect();
    let unknown = StopReason::UnknownRecord("123".into());
    assert_eq!(reasons, [("gone", &StopReason::Gone), ("s", &unknown)]);
    assert!(poll(&mut reader).await.is_empty());
    // Made anew it has other ranges of keys, by which aggregates are told that are not its own.
    stream.write("gone", &pack(&[("k", Some(7), b"b")]));
    stream.change("gone", |data| data.hashes = Some((0, 10)));
    open(&mut reader, "gone", Position::Beginning).await;
    assert_eq!(values(&next(&mut reader).await), ["b"]);
    stream.state().shards.remove("gone");
    while poll(&mut reader).await.stops.is_empty() {}
    stream.write("gone", &pack(&[("k", Some(20), b"c")]));
    stream.change("gone", |data| data.hashes = Some((11, 30)));
    open(&mut reader, "gone", Position::Beginning).await;
    assert_eq!(values(&next(&mut reader).await), ["c"]);
}

#[tokio::test]
async fn records_deleted_before_they_were_read_stop() {
    let stream = FakeStream::default();
    for value in ["a", "b", "c", "d"] {
        stream.write("s", value.as_bytes());
    }
    stream.change("s", |data| data.trimmed = 2);
    let (first, third) = (stream.sequence("s", 0), stream.sequence("s", 2));
    let expected = [Stop {
        split: "s".to_owned(),
        reason: StopReason::Trimmed(first.clone()),
    }];
    for (position, gaps) in [
        (Position::After(first.clone()), 0),
        // What is left is far behind.
        (Position::After(first.clone()), 3),
    ] {
        stream.state().gaps = gaps;
        let mut reader = stream.reader();
        open(&mut reader, "s", position).await;
        let batch = next(&mut reader).await;
        assert_eq!((&batch.stops[..], batch.moves.len()), (&expected[..], 0));
        assert!(poll(&mut reader).await.is_empty());
        // Who could not note it hears it again.
        reader.rewind().await.unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(next(&mut reader).await.stops, expected);
        // Somebody has decided where it goes on.
        open(&mut reader, "s", Position::Time(0)).await;
        assert_eq!(values(&next(&mut reader).await), ["c", "d"]);
    }
    for (position, expected) in [
        (Position::Beginning, "c d"),
        // Somebody has decided where it begins.
        (Position::At(first), "c d"),
        (Position::At(third.clone()), "c d"),
        (Position::After(third), "d"),
    ] {
        let mut reader = stream.reader();
        open(&mut reader, "s", position).await;
        assert_eq!(values(&next(&mut reader).await).join(" "), expected);
    }
}

#[tokio::test]
async fn a_shard_with_nothing_left_stops_if_it_is_closed() {
    for tells_children in [true, false] {
        let stream = FakeStream::default();
        stream.write("s", b"a");
        let last = stream.sequence("s", 0);
        stream.change("s", |data| data.trimmed = 1);
        let mut reader = stream.reader();
        open(&mut reader, "s", Position::After(last)).await;
        assert!(poll(&mut reader).await.is_empty());
        stream.write("s", b"b");
        assert_eq!(values(&next(&mut reader).await), ["b"]);

        // Whether more than the last record was deleted of it nobody knows.
        stream.change("s", |data| {
            data.closed = true;
            data.tells_children = tells_children;
        });
        for trimmed in [1, 2] {
            stream.change("s", |data| data.trimmed = trimmed);
            let mut reader = stream.reader();
            let last = stream.sequence("s", 1);
            open(&mut reader, "s", Position::After(last.clone())).await;
            let batch = next(&mut reader).await;
            assert!(batch.records().is_empty());
            let reasons: Vec<_> = batch.stops.iter().map(|s| &s.reason).collect();
            match trimmed {
                1 => assert_eq!((batch.moves[0].ended, reasons.len()), (true, 0)),
                _ => assert_eq!(reasons, [&StopReason::Trimmed(last)]),
            }
        }
    }
}

#[tokio::test]
async fn where_nothing_comes_the_oldest_record_is_asked_for() {
    let stream = FakeStream::default();
    for value in ["a", "b", "c"] {
        stream.write("s", value.as_bytes());
    }
    // It took its time, and was not deleted.
    stream.change("s", |data| data.closed = true);
    stream.state().gaps = 7;
    let mut reader = stream.reader();
    let second = Position::After(stream.sequence("s", 1));
    open(&mut reader, "s", second).await;
    assert_eq!(values(&next(&mut reader).await), ["c"]);

    stream.change("s", |data| {
        data.closed = false;
        data.stalls = true;
        data.trimmed = 1;
    });
    let mut reader = stream.reader();
    let first = stream.sequence("s", 0);
    open(&mut reader, "s", Position::After(first.clone())).await;
    let stops = next(&mut reader).await.stops;
    assert_eq!(stops[0].reason, StopReason::Trimmed(first));

    // Nothing is left: it goes on with what comes.
    stream.change("s", |data| data.trimmed = 3);
    let mut reader = stream.reader();
    let last = Position::After(stream.sequence("s", 2));
    open(&mut reader, "s", last).await;
    for _ in 0..10 {
        assert!(poll(&mut reader).await.is_empty());
    }
    stream.write("s", b"d");
    assert_eq!(values(&next(&mut reader).await), ["d"]);
}

#[tokio::test]
async fn a_new_iterator_asks_whether_records_were_deleted_meanwhile() {
    let hour = Duration::from_secs(3600);
    for (kept, stops) in [(Duration::ZERO, true), (hour, false)] {
        let stream = FakeStream::default();
        stream.write("s", b"a");
        let mut reader = Reader::new(stream.clone(), PACE, kept);
        open(&mut reader, "s", Position::Beginning).await;
        assert_eq!(values(&next(&mut reader).await), ["a"]);
        // An answer says that it is all.
        assert!(poll(&mut reader).await.is_empty());
        stream.change("s", |data| data.trimmed = 1);
        stream.write("s", b"b");
        stream.expire_iterators();
        let mut batch = Batch::default();
        while batch.is_empty() {
            batch = reader.poll(&LIMITS).await.unwrap_or_else(|e| panic!("{e}"));
        }
        assert_eq!(batch.stops.is_empty(), !stops);
        if stops {
            continue;
        }
        assert_eq!(values(&batch), ["b"]);
        // Nor if it could not be stored.
        reader.rewind().await.unwrap_or_else(|e| panic!("{e}"));
        let batch = next(&mut reader).await;
        let expected = (vec!["b".to_owned()], vec![]);
        assert_eq!((values(&batch), batch.stops), expected);
    }
}

#[tokio::test]
async fn ranges_are_looked_up_again_where_no_record_tells_the_stream() {
    let stream = FakeStream::default();
    stream.change("s", |data| data.hashes = Some((0, 10)));
    let mut reader = stream.reader();
    open(&mut reader, "s", Position::Beginning).await;
    assert!(poll(&mut reader).await.is_empty());
    // Made anew.
    stream.change("s", |data| data.hashes = Some((11, 30)));
    stream.write("s", &pack(&[("k", Some(20), b"a")]));
    stream.expire_iterators();
    assert_eq!(values(&next(&mut reader).await), ["a"]);
}

#[tokio::test]
async fn a_shard_is_opened_while_nobody_says_its_range() {
    // At the opening, and of the throttled ones at the first request, too.
    let throttled = || Failure::Throttled("t".into());
    for faults in [
        vec![throttled(), throttled()],
        vec![Failure::Transient("t".into())],
    ] {
        let stream = FakeStream::default();
        stream.change("s", |data| data.hashes = Some((0, 10)));
        stream.write("s", &pack(&[("k", Some(20), b"foreign")]));
        stream.write("s", &pack(&[("k", Some(5), b"own")]));
        stream.state().list_faults = faults;
        let mut reader = stream.reader();
        open(&mut reader, "s", Position::Beginning).await;
        assert_eq!(values(&next(&mut reader).await), ["own"]);
        assert!(stream.state().list_faults.is_empty());
    }
    let stream = FakeStream::default();
    stream.state().list_faults = vec![Failure::Refused("r".into())];
    let refused = stream.reader().open("s", Position::Beginning).await;
    assert!(
        matches!(refused, Err(SourceError::Refused { .. })),
        "{refused:?}"
    );
}

#[tokio::test]
async fn few_bytes_are_few_records() {
    let stream = FakeStream::default();
    for _ in 0..9 {
        stream.write("s", &[b'x'; 1_500]);
    }
    let mut reader = stream.reader();
    open(&mut reader, "s", Position::Beginning).await;
    let limits = Limits {
        bytes: 3 << 10,
        ..LIMITS
    };
    let batch = reader.poll(&limits).await.unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(batch.records().len(), 3);
}

#[tokio::test]
async fn few_records_are_of_few_shards() {
    let stream = FakeStream::default();
    let shards = ["a", "b", "c"];
    for shard in shards {
        stream.write(shard, b"1");
    }
    let mut reader = stream.reader();
    for shard in shards {
        open(&mut reader, shard, Position::Beginning).await;
    }
    let limits = Limits {
        records: 1,
        ..LIMITS
    };
    for _ in shards {
        let batch = reader.poll(&limits).await.unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(batch.records().len(), 1);
        reader.ack(&batch);
    }
}

#[tokio::test]
async fn an_aggregate_is_never_split() {
    let stream = FakeStream::default();
    let records: Vec<_> = (0..9).map(|_| ("k", Some(7), &b"x"[..])).collect();
    stream.write("s", &pack(&records));
    // Of another shard, since its keys are not of this one: passed over whole.
    stream.write(
        "s",
        &pack(&[("k", Some(5), b"mine"), ("k", Some(11), b"other")]),
    );
    stream.write("s", b"z");
    stream.change("s", |data| data.hashes = Some((5, 10)));
    let mut reader = stream.reader();
    open(&mut reader, "s", Position::Beginning).await;
    let limits = Limits {
        records: 1,
        ..LIMITS
    };
    let mut sizes = Vec::new();
    while sizes.iter().sum::<usize>() < 10 {
        let batch = reader.poll(&limits).await.unwrap_or_else(|e| panic!("{e}"));
        reader.ack(&batch);
        sizes.push(batch.records().len());
    }
    // The one that is left out may have had a poll of its own.
    sizes.retain(|&n| n > 0);
    assert_eq!(sizes, [9, 1]);
    assert!(poll(&mut reader).await.is_empty());
}
