use arrow::array::AsArray;
use arrow::compute::{concat_batches, filter_record_batch};
use arrow::datatypes::Int64Type;
use bytes::Bytes;
use rakam_event::schema::{SYSTEM_FIELDS, XID};
use uuid::Uuid;

use super::*;
use crate::period::{MICROS_PER_DAY, Period, plan_inside};
use crate::read::days;
use crate::rows::RowBits;
use crate::sort::by_time;
use crate::testing::{Rng, all_types, batch};

fn options() -> FileOptions {
    FileOptions {
        project: "acme".into(),
        project_id: 1,
        collection: "pageview".into(),
        collection_id: 1,
        flush_id: Uuid::nil(),
        period: Period::Year,
        first_day: 19_723,
        replaces: None,
    }
}

fn file(schema: &Schema, rows: &RecordBatch) -> Bytes {
    let mut writer = FileWriter::new(schema, &options(), Vec::new());
    writer.write(rows).unwrap();
    writer.finish().unwrap().sink.into()
}

/// Sorted batches, and each as a file.
fn lake(schema: &Schema, sizes: &[usize], seed: u64) -> (Vec<RecordBatch>, Vec<Bytes>) {
    let mut rng = Rng::new(seed);
    let batches: Vec<_> = sizes
        .iter()
        .map(|n| by_time(&batch(schema, *n, &mut rng)).unwrap())
        .collect();
    let files = batches.iter().map(|rows| file(schema, rows)).collect();
    (batches, files)
}

fn input(file: &Bytes, rows: &RecordBatch) -> Input<Bytes> {
    Input {
        file: file.clone(),
        schema_version: 1,
        n: rows.num_rows() as u64,
        deleted: None,
    }
}

fn all(rows: MergedRows, schema: &Schema) -> RecordBatch {
    let batches: Vec<_> = rows.map(Result::unwrap).collect();
    concat_batches(&schema.arrow(), &batches).unwrap()
}

#[test]
fn a_merge_is_a_stable_sort() {
    let schema = all_types();
    for (seed, sizes) in [(1, vec![1]), (2, vec![3000, 1, 20_000]), (3, vec![500; 20])] {
        let (batches, files) = lake(&schema, &sizes, seed);
        let inputs = files.iter().zip(&batches).map(|(f, b)| input(f, b));
        let merged = MergedRows::open(inputs.collect(), &schema, None).unwrap();
        let merged = all(merged, &schema);
        let whole = concat_batches(&schema.arrow(), &batches).unwrap();
        assert_eq!(merged, by_time(&whole).unwrap());
    }
}

#[test]
fn deleted_and_old_rows_stay_behind() {
    let schema = all_types();
    let (batches, files) = lake(&schema, &[2000, 3000], 4);
    let mut bits = RowBits::new(2000);
    for row in (0..2000).filter(|row| row % 3 == 0 || (500..900).contains(row)) {
        bits.insert(row);
    }
    let deleted = Arc::new(bits.finish());
    let from_us = times(&batches[1]).unwrap()[1000];
    let mut inputs = vec![input(&files[0], &batches[0]), input(&files[1], &batches[1])];
    inputs[0].deleted = Some(Arc::clone(&deleted));
    let mut rows = MergedRows::open(inputs, &schema, Some(from_us)).unwrap();
    let merged: Vec<_> = rows.by_ref().map(Result::unwrap).collect();
    let merged = concat_batches(&schema.arrow(), &merged).unwrap();
    let left = deleted.remove_from(&batches[0], 0).unwrap();
    let whole = concat_batches(&schema.arrow(), [&left, &batches[1]]).unwrap();
    let whole = by_time(&whole).unwrap();
    let kept: Vec<bool> = times(&whole)
        .unwrap()
        .iter()
        .map(|t| *t >= from_us)
        .collect();
    let kept = filter_record_batch(&whole, &kept.into()).unwrap();
    assert_eq!(merged, kept);
    assert_eq!(rows.expired(), (whole.num_rows() - kept.num_rows()) as u64);
}

#[test]
fn a_file_of_another_length_or_order_is_corrupt() {
    let schema = all_types();
    let (batches, files) = lake(&schema, &[300], 5);
    let mut wrong = input(&files[0], &batches[0]);
    wrong.n += 1;
    let mut rows = MergedRows::open(vec![wrong], &schema, None).unwrap();
    assert!(rows.any(|batch| batch.is_err()));
    for end in [0, 100, files[0].len() - 1] {
        let cut = Input {
            file: files[0].slice(..end),
            ..input(&files[0], &batches[0])
        };
        assert!(MergedRows::open(vec![cut], &schema, None).is_err());
    }
}

#[test]
fn rows_go_to_the_files_of_the_plan() {
    let schema = all_types();
    let (batches, files) = lake(&schema, &[20_000, 5000], 6);
    let year = |day: i32| Period::Year.around(day).0;
    let mut counts = BTreeMap::new();
    for file in &files {
        for (day, n) in days(file.clone(), 1000).unwrap() {
            *counts.entry(day).or_default() += n;
        }
    }
    assert_eq!(counts.values().sum::<u64>(), 25_000);
    let plan = plan_inside(Period::Year, &counts, 50);
    let inputs = files.iter().zip(&batches).map(|(f, b)| input(f, b));
    let mut writer = PlanWriter::new(&schema, &options(), plan.clone(), 1 << 30);
    let mut written = Vec::new();
    for batch in MergedRows::open(inputs.collect(), &schema, None).unwrap() {
        let sink = || Ok::<_, LakeError>(Vec::new());
        written.extend(writer.write(&batch.unwrap(), sink).unwrap());
        assert!(writer.open.len() <= 3);
    }
    written.extend(writer.finish().unwrap());
    assert_eq!(written.len(), plan.files().len());
    let mut xids = Vec::new();
    for (place, file) in written {
        assert!(file.min_time_us >= i64::from(place.first_day) * MICROS_PER_DAY);
        assert!(file.max_time_us < (i64::from(place.last_day) + 1) * MICROS_PER_DAY);
        assert_eq!(year(place.first_day), year(place.last_day));
        let reader = FileReader::open(Bytes::from(file.sink), &schema, 1, 8192).unwrap();
        for batch in reader.map(Result::unwrap) {
            let column = batch.column_by_name(XID).unwrap();
            xids.extend_from_slice(column.as_primitive::<Int64Type>().values());
        }
    }
    let mut expected: Vec<i64> = Vec::new();
    for batch in &batches {
        let column = batch.column_by_name(XID).unwrap();
        expected.extend_from_slice(column.as_primitive::<Int64Type>().values());
    }
    xids.sort_unstable();
    expected.sort_unstable();
    assert_eq!(xids, expected);
}

/// What is still in memory is estimated far above what it compresses to: by the estimate files would stay small for ever.
#[test]
fn no_file_but_the_last_is_small() {
    let mut schema = all_types();
    schema.fields.truncate(SYSTEM_FIELDS.len() + 4);
    let (batches, files) = lake(&schema, &[90_000, 90_000], 7);
    let counts = BTreeMap::from_iter((0..40_000).map(|day| (day, 1)));
    let target = 1 << 20;
    let plan = plan_inside(Period::Year, &counts, u64::MAX);
    let mut writer = PlanWriter::new(&schema, &options(), plan, target);
    let inputs = files.iter().zip(&batches).map(|(f, b)| input(f, b));
    let mut sizes = BTreeMap::<i32, Vec<u64>>::new();
    let sink = || Ok::<_, LakeError>(Vec::new());
    for batch in MergedRows::open(inputs.collect(), &schema, None).unwrap() {
        for (place, file) in writer.write(&batch.unwrap(), sink).unwrap() {
            sizes.entry(place.first_day).or_default().push(file.bytes);
        }
    }
    for (place, file) in writer.finish().unwrap() {
        sizes.entry(place.first_day).or_default().push(file.bytes);
    }
    assert!(sizes.values().any(|sizes| sizes.len() > 1), "{sizes:?}");
    for sizes in sizes.values() {
        let (_, complete) = sizes.split_last().unwrap();
        assert!(
            complete.iter().all(|bytes| *bytes >= target / 2),
            "{sizes:?}"
        );
    }
}
