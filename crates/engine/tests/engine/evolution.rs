//! Files and chunks of older schema versions, pending fields, and fields dropped and added again.

use rakam_engine::{CmpOp, Expr};
use rakam_event::schema::{DroppedField, Field, Schema};
use rakam_event::types::FieldType;
use rakam_lake::scalar::Scalar;

use crate::fixture::{N, Row, Tiers, context, field, numbers, plan};

const EXTRA: i32 = 10;

fn row(schema: &Schema, n: i64, extra: Option<&str>, values: &[(i32, Scalar)]) -> Row {
    schema
        .fields
        .iter()
        .map(|f| match f.id {
            1 => Some(Scalar::Timestamptz(n)),
            EXTRA => extra.map(|e| Scalar::Text(e.to_owned())),
            N => Some(Scalar::Int8(n)),
            id => values
                .iter()
                .find(|(i, _)| *i == id)
                .map(|(_, v)| v.clone()),
        })
        .collect()
}

fn user(more: &[Field], version: i32) -> Schema {
    let mut fields = vec![field(N, "n", FieldType::Int8, 1, true)];
    fields.extend_from_slice(more);
    Schema::new(version, fields)
}

fn json(value: Option<&Scalar>) -> serde_json::Value {
    match value {
        Some(Scalar::Text(text)) => serde_json::from_str(text).unwrap(),
        other => panic!("{other:?} is no JSON"),
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
async fn values_wait_in_extra_for_their_column() {
    let old = user(&[], 1);
    let price = field(17, "price", FieldType::Int4, 2, true);
    let new = user(std::slice::from_ref(&price), 2);
    let old_rows = [
        row(&old, 0, Some(r#"{"price": 5, "other": "x"}"#), &[]),
        row(&old, 1, Some(r#"{"price": "dear"}"#), &[]),
        row(&old, 2, None, &[]),
    ];
    let new_rows = [
        row(&new, 3, None, &[(17, Scalar::Int4(5))]),
        row(&new, 4, Some(r#"{"price": "cheap"}"#), &[]),
    ];
    for as_file in [true, false] {
        let mut tiers = Tiers::default();
        if as_file {
            tiers.file(&old, &old_rows, true).await;
            tiers.file(&new, &new_rows, false).await;
        } else {
            tiers.chunk(&old, &old_rows);
            tiers.chunk(&new, &new_rows);
        }
        let ctx = context();
        let (mut found, _) = tiers
            .scan(&new, plan(&[N, 17, EXTRA], None, None), &ctx)
            .await;
        found.sort_by_key(|row| format!("{:?}", row[0]));
        let prices: Vec<_> = found.iter().map(|row| row[1].clone()).collect();
        let five = Some(Scalar::Int4(5));
        assert_eq!(prices, [five.clone(), None, None, five, None]);
        assert_eq!(
            json(found[0][2].as_ref()),
            serde_json::json!({"other": "x"})
        );
        assert_eq!(
            json(found[1][2].as_ref()),
            serde_json::json!({"price": "dear"})
        );
        assert_eq!(found[2][2], None);
        assert_eq!(found[3][2], None);
        assert_eq!(
            json(found[4][2].as_ref()),
            serde_json::json!({"price": "cheap"})
        );

        let only = plan(&[N], Some(eq(17, Scalar::Int4(5))), None);
        let (found, _) = tiers.scan(&new, only, &ctx).await;
        assert_eq!(numbers(&found), [0, 3]);
        let none = plan(&[N], Some(Expr::IsNull(Box::new(Expr::Column(17)))), None);
        let (found, _) = tiers.scan(&new, none, &ctx).await;
        assert_eq!(numbers(&found), [1, 2, 4]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pending_fields_are_read_through_extra() {
    let schema = user(&[field(17, "color", FieldType::Text, 2, false)], 2);
    let rows = [
        row(
            &schema,
            0,
            Some(r#"{"a": 1}"#),
            &[(17, Scalar::Text("red".into()))],
        ),
        row(&schema, 1, None, &[(17, Scalar::Text("blue".into()))]),
        row(&schema, 2, None, &[]),
    ];
    let mut tiers = Tiers::default();
    tiers.file(&schema, &rows[..1], true).await;
    tiers.chunk(&schema, &rows[1..2]);
    tiers.tail(&schema, &rows[2..]);
    let (mut found, _) = tiers
        .scan(&schema, plan(&[N, EXTRA], None, None), &context())
        .await;
    found.sort_by_key(|row| format!("{:?}", row[0]));
    assert_eq!(
        json(found[0][1].as_ref()),
        serde_json::json!({"a": 1, "color": "red"})
    );
    assert_eq!(
        json(found[1][1].as_ref()),
        serde_json::json!({"color": "blue"})
    );
    assert_eq!(found[2][1], None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_field_dropped_and_added_again_is_another_field() {
    let before = user(&[field(17, "x", FieldType::Text, 1, true)], 1);
    let after = user(&[field(18, "x", FieldType::Int8, 3, true)], 3);
    let rows_before = [row(&before, 0, None, &[(17, Scalar::Text("old".into()))])];
    let rows_after = [row(&after, 1, None, &[(18, Scalar::Int8(7))])];
    for as_file in [true, false] {
        let mut tiers = Tiers::default();
        if as_file {
            tiers.file(&before, &rows_before, true).await;
            tiers.file(&after, &rows_after, true).await;
        } else {
            tiers.chunk(&before, &rows_before);
            tiers.chunk(&after, &rows_after);
        }
        let (mut found, _) = tiers
            .scan(&after, plan(&[N, 18], None, None), &context())
            .await;
        found.sort_by_key(|row| format!("{:?}", row[0]));
        assert_eq!(found[0][1], None);
        assert_eq!(found[1][1], Some(Scalar::Int8(7)));
        let filter = Some(eq(18, Scalar::Int8(7)));
        let (found, stream) = tiers
            .scan(&after, plan(&[N], filter, None), &context())
            .await;
        assert_eq!(numbers(&found), [1]);
        assert!(!as_file || stream.metrics().row_groups_read <= 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_field_of_another_type_is_an_error() {
    let stored = user(&[field(17, "x", FieldType::Text, 1, true)], 1);
    let claimed = user(&[field(17, "x", FieldType::Int8, 1, true)], 1);
    let mut tiers = Tiers::default();
    let rows = [row(&stored, 0, None, &[(17, Scalar::Text("1".into()))])];
    tiers.file(&stored, &rows, true).await;
    let input = tiers.input(&claimed, plan(&[17], None, None));
    let broker = std::sync::Arc::new(tiers.broker);
    let mut stream = rakam_engine::execute(input, broker, &context()).unwrap();
    let error = futures::StreamExt::next(&mut stream)
        .await
        .unwrap()
        .unwrap_err();
    assert_eq!(error.sqlstate(), "XX001");
    assert!(futures::StreamExt::next(&mut stream).await.is_none());
}

/// A row chunk answers as the Arrow chunk of the same events, whatever became of the schema since the digest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_chunks_answer_as_arrow_chunks() {
    let events = [
        r#"{"n":1,"price":"12.50","tags":["a",1],"color":"red","deep":{"b":[1, 2],"a":null}}"#,
        r#"{"n":"2","price":"dear","tags":"one","color":7,"day":"2024-02-30"}"#,
        r#"{"n":{"no":"number"},"price":null,"tags":[],"color":true,"day":"2024-02-29"}"#,
        r#"{"n":4.0,"price":1e3,"long":"abcdefghijklmnopqrstuvwxyz","day":5,"xmin":1}"#,
        r#"{"N":5,"price":[1],"color":null,"day":"2024-02-29T10:00:00Z","_user":"u","_time":1699999999}"#,
        r#"{"n":6,"_time":"1999-01-01","deep":"flat","tags":{"a":1},"long":""}"#,
        r#"{}"#,
    ];
    let price = |ready| {
        field(
            17,
            "price",
            FieldType::Numeric {
                precision: 9,
                scale: 2,
            },
            2,
            ready,
        )
    };
    let tags = |ready| field(18, "tags", FieldType::TextArray, 2, ready);
    let color = |ready| field(19, "color", FieldType::Text, 3, ready);
    let day = |ready| field(20, "day", FieldType::Date, 3, ready);
    let long = |ready| field(21, "long", FieldType::Text, 3, ready);
    let old = user(&[price(false), tags(true)], 2);
    let ctx = context();
    for ready in [false, true] {
        let all = [
            price(true),
            tags(true),
            color(true),
            day(ready),
            long(ready),
        ];
        let new = user(&all, 3);
        let mut ids = vec![1, 2, 9, EXTRA, 16, 17, 18, 19];
        if ready {
            ids.extend([20, 21]);
        }
        let (mut arrow, mut rows) = (Tiers::default(), Tiers::default());
        arrow.digested_chunk(&old, &events);
        rows.row_chunk(&old, &events);
        for wanted in [&ids[..], &ids[..3], &ids[4..], &[]] {
            let (left, _) = arrow.scan(&new, plan(wanted, None, None), &ctx).await;
            let (right, _) = rows.scan(&new, plan(wanted, None, None), &ctx).await;
            assert_eq!(left, right, "ready {ready}, columns {wanted:?}");
            assert_eq!(left.len(), events.len());
        }
        let filter = eq(19, Scalar::Text("7".into()));
        let (found, _) = rows.scan(&new, plan(&[16], Some(filter), None), &ctx).await;
        assert_eq!(found, [vec![Some(Scalar::Int8(2))]]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_dropped_field_left_in_extra_is_not_read() {
    let before = user(&[], 1);
    // The fixture's rows are all of transaction 700.
    let dropped = |xid| DroppedField {
        name: "x".to_owned(),
        xid,
        at_us: 1_000,
        own_since_us: i64::MIN,
    };
    let fields = [field(18, "x", FieldType::Text, 3, true)];
    let received = |at| [(9, Scalar::Timestamptz(at))];
    let text = Some(r#"{"x": "old", "y": 1}"#);
    let rows = [
        row(&before, 0, text, &received(500)),
        row(&before, 1, text, &received(2_000)),
    ];
    for (xid, expected) in [(701, [false, true]), (700, [true, true])] {
        let schema = user(&fields, 3).with_dropped(vec![dropped(xid)]);
        for as_file in [true, false] {
            let mut tiers = Tiers::default();
            if as_file {
                tiers.file(&before, &rows, true).await;
            } else {
                tiers.chunk(&before, &rows);
            }
            let (mut found, _) = tiers
                .scan(&schema, plan(&[N, 18, EXTRA], None, None), &context())
                .await;
            found.sort_by_key(|row| format!("{:?}", row[0]));
            for (row, there) in found.iter().zip(expected) {
                assert_eq!(row[1].is_some(), there, "{row:?}");
                assert_eq!(json(row[2].as_ref()), serde_json::json!({"y": 1}));
            }
            let filter = Some(eq(18, Scalar::Text("old".into())));
            let (found, _) = tiers
                .scan(&schema, plan(&[N], filter, None), &context())
                .await;
            assert_eq!(found.len(), expected.iter().filter(|e| **e).count());
        }
    }
}
