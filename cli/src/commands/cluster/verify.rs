//! `clusterctl cluster verify`: whether all members have the same copy.

use std::time::Duration;

use proto::v1;
use proto::v1::membership_client::MembershipClient;

use crate::connect::Session;
use crate::failure::{Exit, Failure};
use crate::output::{self, or_dash};

/// Members read all of their data: that may take minutes.
const VERIFY_LIMIT: Duration = Duration::from_secs(600);

pub(super) async fn run(
    session: &Session,
    mut client: MembershipClient<tonic::transport::Channel>,
) -> Result<(), Failure> {
    let what = "compare the members' copies";
    let limit = session.global.timeout.unwrap_or(VERIFY_LIMIT);
    let answer = tokio::time::timeout(limit, client.verify(v1::VerifyRequest {})).await;
    let found = match answer {
        Ok(Ok(found)) => found.into_inner(),
        Ok(Err(status)) => return Err(Failure::status(what, &status)),
        Err(_) => {
            return Err(Failure::new(Exit::Timeout, format!("cannot {what}"))
                .why(format!("no answer within {} s", limit.as_secs())));
        }
    };
    output::print(session.global.output, &found, table)?;
    if found.faulty {
        return Err(Failure::new(Exit::Failed, "a copy cannot be read").why(found.summary));
    }
    if found.differs {
        return Err(Failure::new(Exit::Failed, "the copies are not the same").why(found.summary));
    }
    if found.members.iter().any(|member| member.outcome != "same") {
        return Err(Failure::new(Exit::Failed, "not every copy was compared").why(found.summary));
    }
    Ok(())
}

fn table(found: &v1::Verification) -> String {
    let rows = found.members.iter().map(|member| {
        let checksum = member.checksum.chars().take(16).collect::<String>();
        let (outcome, detail) = (member.outcome.clone(), or_dash(&member.detail));
        [member.node.clone(), outcome, or_dash(&checksum), detail]
    });
    let members = output::columns(["NODE", "COPY", "SHA-256", "DETAIL"], rows);
    let place = format!("revision {}, log index {}", found.revision, found.log_index);
    format!("{}\n\n{place}: {}", members.trim_end(), found.summary)
}
