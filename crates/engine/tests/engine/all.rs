//! The table of all collections.

use std::sync::Arc;

use futures::TryStreamExt;
use rakam_engine::all::{COLLECTION_FIELD_ID, PROPERTIES_FIELD_ID, part_plan};
use rakam_engine::{CmpOp, Expr, Part, ScanMetrics, execute_all};
use rakam_event::schema::Schema;
use rakam_event::types::FieldType;
use rakam_lake::scalar::Scalar;

use crate::fixture::{N, Row, Tiers, cells, context, field, plan};

fn schema(other: &str) -> Schema {
    Schema::new(
        1,
        vec![
            field(N, "n", FieldType::Int8, 1, true),
            field(17, other, FieldType::Text, 1, true),
        ],
    )
}

fn row(schema: &Schema, n: i64) -> Row {
    schema
        .fields
        .iter()
        .map(|f| match f.id {
            1 => Some(Scalar::Timestamptz(n)),
            2 => Some(Scalar::Text(format!("u{n}"))),
            4 => Some(Scalar::Text("phone".into())),
            N => Some(Scalar::Int8(n)),
            _ => None,
        })
        .collect()
}

async fn parts() -> Vec<Part> {
    let mut parts = Vec::new();
    for (collection, other) in [("click", "page"), ("view", "screen")] {
        let schema = schema(other);
        let mut tiers = Tiers::default();
        tiers
            .file(&schema, &[row(&schema, 1), row(&schema, 2)], true)
            .await;
        tiers.chunk(&schema, &[row(&schema, 3)]);
        tiers.tail(&schema, &[row(&schema, 4)]);
        parts.push(Part {
            collection: collection.to_owned(),
            files: tiers.files,
            chunks: tiers.chunks,
            has_tail: true,
            from_us: None,
            broker: Arc::new(tiers.broker),
            schema,
        });
    }
    parts
}

async fn scan(
    columns: &[i32],
    filter: Option<Expr>,
    limit: Option<u64>,
) -> (Vec<Row>, ScanMetrics) {
    let ctx = context();
    let mut stream = execute_all(plan(columns, filter, limit), parts().await, &ctx).unwrap();
    let batches: Vec<_> = (&mut stream).try_collect().await.unwrap();
    (cells(&batches), stream.metrics())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_collection_begins_where_its_events_are_kept() {
    for (filter, limit, expected) in [
        (None, None, 6),
        (Some(eq(2, Scalar::Text("u2".into()))), None, 1),
        (None, Some(5), 5),
    ] {
        // Anew for each scan: a tail is handed out once.
        let mut parts = parts().await;
        parts[0].from_us = Some(3);
        let mut stream = execute_all(plan(&[1], filter, limit), parts, &context()).unwrap();
        let batches: Vec<_> = (&mut stream).try_collect().await.unwrap();
        assert_eq!(cells(&batches).len(), expected);
    }
}

fn eq(id: i32, value: Scalar) -> Expr {
    Expr::Cmp {
        op: CmpOp::Eq,
        left: Box::new(Expr::Column(id)),
        right: Box::new(Expr::Literal(value)),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_collections_are_one_table() {
    let columns = [COLLECTION_FIELD_ID, 1, 2, 3, 9, PROPERTIES_FIELD_ID];
    let (rows, metrics) = scan(&columns, None, None).await;
    assert_eq!(rows.len(), 8);
    assert_eq!(metrics.rows_out, 8);
    assert_eq!(
        (metrics.files_opened, metrics.chunks_read, metrics.tail_rows),
        (2, 2, 2)
    );
    for row in &rows {
        let Some(Scalar::Timestamptz(n)) = row[1] else {
            panic!()
        };
        assert_eq!(row[2], Some(Scalar::Text(format!("u{n}"))));
        assert_eq!(row[3], None);
        let Some(Scalar::Text(properties)) = &row[5] else {
            panic!()
        };
        let properties: serde_json::Value = serde_json::from_str(properties).unwrap();
        assert_eq!(properties["n"], serde_json::json!(n));
        assert_eq!(properties["_device_id"], serde_json::json!("phone"));
        assert_eq!(properties.as_object().unwrap().len(), 2);
    }
    let clicks = rows
        .iter()
        .filter(|r| r[0] == Some(Scalar::Text("click".into())));
    assert_eq!(clicks.count(), 4);
    assert_eq!(scan(&[], None, None).await.0.len(), 8);
    assert_eq!(scan(&[COLLECTION_FIELD_ID], None, Some(5)).await.0.len(), 5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_filter_on_the_collection_opens_no_other() {
    let filter = Expr::And(vec![
        eq(COLLECTION_FIELD_ID, Scalar::Text("view".into())),
        eq(2, Scalar::Text("u2".into())),
    ]);
    let (rows, metrics) = scan(&[COLLECTION_FIELD_ID, 1], Some(filter), None).await;
    assert_eq!(
        rows,
        [vec![
            Some(Scalar::Text("view".into())),
            Some(Scalar::Timestamptz(2))
        ]]
    );
    assert_eq!(metrics.files_opened, 1);
}

#[test]
fn other_fields_are_refused() {
    let schema = schema("x");
    assert!(part_plan(&plan(&[N], None, None), "c", &schema, None).is_err());
    let filter = Some(Expr::IsNull(Box::new(Expr::Column(PROPERTIES_FIELD_ID))));
    assert!(part_plan(&plan(&[1], filter, None), "c", &schema, None).is_err());
}
