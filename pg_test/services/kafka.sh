#!/usr/bin/env bash
# The real Apache Kafka broker (KRaft, one node, combined roles) on loopback.
# Needs Java 17 or newer, and Maven to fetch the broker's jars once.
#   KAFKA_VERSION  (default 4.1.0; 3.9.1 is the other line worth testing)
#   KAFKA_PORT     (default: a free one)   KAFKA_HEAP (default 512m)
#   KAFKA_AUTH=scram   lets in by SASL/SCRAM only: SHA-256 (user rakam, password
#                      rakam) and SHA-512
# `restart` and `start` after `crash` keep the port and the data; `start`
# after `stop` begins empty on a new port, or on the old data with
# KAFKA_KEEP_DATA=1.
. "$(dirname "$0")/lib.sh"
. "$HERE/jvm.sh"

KAFKA_VERSION=${KAFKA_VERSION:-4.1.0}
NAME=kafka
POM=$HERE/kafka-pom.xml

java_here() { java_at_least 17 || absent "Java 17 or newer is not installed"; }

install_only() {
  local d=$CACHE/kafka-$KAFKA_VERSION
  java_here >/dev/null
  if [ ! -f "$d/.installed" ]; then
    command -v mvn >/dev/null || absent "Maven is not installed"
    (
      flock 9
      if [ ! -f "$d/.installed" ]; then
        mkdir -p "$d"
        cp "$POM" "$d/pom.xml"
        mvn -q -B -f "$d/pom.xml" -Dstyle.color=never -Dmaven.repo.local="$CACHE/maven" -Dkafka.version="$KAFKA_VERSION" package
        ls "$d"/target/kafka/lib/kafka_2.13-*.jar >/dev/null
        rm -rf "$CACHE/maven"
        touch "$d/.installed"
      fi
    ) 9>"$CACHE/kafka.lock" >&2
  fi
  printf '%s\n' "$d"
}

start() {
  local d java port cport data cp proto=PLAINTEXT extra=
  java=$(java_here)
  d=$(install_only)
  cp="$d/target/kafka/lib/*"
  data=$RUN/kafka-data
  if [ "${KAFKA_KEEP_DATA:-0}" = 1 ] && [ -f "$data.ports" ]; then
    read -r port cport <"$data.ports"
  else
    rm -rf "$data"
    port=${KAFKA_PORT:-$(free_port)}
    cport=$(free_port)
  fi
  mkdir -p "$data"
  printf '%s %s\n' "$port" "$cport" >"$data.ports"
  if [ "${KAFKA_AUTH:-}" = scram ]; then
    proto=SASL_PLAINTEXT
    extra='sasl.enabled.mechanisms=SCRAM-SHA-256,SCRAM-SHA-512
sasl.mechanism.inter.broker.protocol=SCRAM-SHA-256
listener.name.sasl_plaintext.scram-sha-256.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required username="rakam" password="rakam";
listener.name.sasl_plaintext.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;'
  fi
  cat >"$RUN/kafka.properties" <<EOF
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:$cport
listeners=$proto://127.0.0.1:$port,CONTROLLER://127.0.0.1:$cport
advertised.listeners=$proto://127.0.0.1:$port
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT
inter.broker.listener.name=$proto
controller.listener.names=CONTROLLER
log.dirs=$data
num.partitions=4
auto.create.topics.enable=true
# one node: internal topics cannot have three replicas
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
# quick for tests
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
log.retention.check.interval.ms=1000
log.cleaner.backoff.ms=1000
log.segment.delete.delay.ms=1000
transaction.abort.timed.out.transaction.cleanup.interval.ms=1000
$extra
EOF
  cat >"$RUN/kafka-log4j2.yaml" <<'EOF'
Configuration:
  status: error
  Appenders:
    Console: {name: out, target: SYSTEM_OUT, PatternLayout: {pattern: "%d %p %c{1} %m%n"}}
  Loggers:
    Root: {level: WARN, AppenderRef: {ref: out}}
EOF
  if [ ! -f "$data/meta.properties" ]; then
    # StorageTool would make it as well, in some seconds. Not with a hyphen in front: that is an option.
    local id
    id=$(python3 -c 'import base64, os
id = b"-"
while id.startswith(b"-"):
    id = base64.urlsafe_b64encode(os.urandom(16)).rstrip(b"=")
print(id.decode())')
    "$java" -cp "$cp" kafka.tools.StorageTool format -t "$id" -c "$RUN/kafka.properties" \
      ${KAFKA_AUTH:+--add-scram 'SCRAM-SHA-256=[name=rakam,password=rakam]'} >&2
  fi
  launch "$NAME" "$java" -Xms256m -Xmx"${KAFKA_HEAP:-512m}" -XX:+UseSerialGC \
    -Djava.net.preferIPv4Stack=true -Dlog4j2.configurationFile="$RUN/kafka-log4j2.yaml" \
    -cp "$cp" kafka.Kafka "$RUN/kafka.properties"
  # ready: an ApiVersions v0 request is answered
  wait_for "$NAME" 120 python3 -c '
import socket, struct, sys
s = socket.create_connection(("127.0.0.1", int(sys.argv[1])), 2)
body = struct.pack(">hhih", 18, 0, 1, 2) + b"up"
s.sendall(struct.pack(">i", len(body)) + body)
s.settimeout(2)
assert len(s.recv(4)) == 4' "$port"
  cat >"$RUN/$NAME.env" <<EOF
export KAFKA_BOOTSTRAP_SERVERS=127.0.0.1:$port
export KAFKA_SECURITY_PROTOCOL=$proto
export KAFKA_TOOLS_CLASSPATH='$cp'
EOF
}
case ${1:-} in
restart) KAFKA_KEEP_DATA=1 ;;
start) [ ! -f "$RUN/$NAME.crashed" ] || KAFKA_KEEP_DATA=1 ;;
stop) rm -f "$RUN/$NAME.crashed" ;;
esac
service "$NAME" "$@"
