//! `Storage`: pools and networks in the configuration, images in the pools of the node that is
//! asked (for a shared pool, of all).

use cluster::Consistency;
use futures::StreamExt as _;
use proto::record::{NetworkRecord, PoolKind, PoolRecord};
use proto::v1::storage_server::Storage;
use proto::v1::{
    CreateNetworkRequest, CreatePoolRequest, DeleteImageRequest, DeleteImageResponse,
    DeleteNetworkRequest, DeleteNetworkResponse, DeletePoolRequest, DeletePoolResponse, Image,
    ImportImageRequest, ListImagesRequest, ListImagesResponse, ListNetworksRequest,
    ListNetworksResponse, ListPoolsRequest, ListPoolsResponse, Network,
};
use proto::{Name, keys, parse_image};
use tonic::{Request, Response, Status, Streaming};

use super::forward::Caller;
use super::{Api, parse_name};
use crate::documents::{Entry, Wanted};
use crate::node::Node;
use crate::storage::{ImageInfo, ImageKind, Import, Pool, Pools, StorageError};

impl From<StorageError> for Status {
    fn from(error: StorageError) -> Self {
        let text = error.to_string();
        match error {
            StorageError::Reference(_) | StorageError::BadPath(_) => Self::invalid_argument(text),
            StorageError::UnknownPool(_) | StorageError::MissingImage { .. } => {
                Self::not_found(text)
            }
            StorageError::Exists(_) => Self::already_exists(text),
            StorageError::Import { .. } => Self::invalid_argument(text),
            StorageError::NotMounted { .. }
            | StorageError::OtherPool { .. }
            | StorageError::DiskLength { .. }
            | StorageError::WrongKind { .. }
            | StorageError::NoFolder { .. }
            | StorageError::NotAFile { .. } => Self::failed_precondition(text),
            StorageError::Io { .. } => Self::internal(text),
        }
    }
}

/// Runs blocking storage work off the async threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StorageError> + Send + 'static,
) -> Result<T, Status> {
    let done = tokio::task::spawn_blocking(work).await;
    Ok(done.map_err(|error| Status::internal(format!("internal error: {error}")))??)
}

async fn pools(node: &Node) -> Result<Vec<PoolRecord>, Status> {
    match node.store.pools(Consistency::Linearizable).await {
        Ok(pools) => Ok(pools),
        // Reading images needs no quorum.
        Err(_) => Ok(node.store.pools(Consistency::Stale).await?),
    }
}

fn kind_word(kind: PoolKind) -> &'static str {
    match kind {
        PoolKind::LocalDir => "local-dir",
        PoolKind::SharedDir => "shared-dir",
    }
}

fn image(pool: &str, info: ImageInfo) -> Image {
    Image {
        pool: pool.to_owned(),
        name: info.name,
        kind: info.kind,
        size_bytes: info.size_bytes,
        sha256: info.sha256,
    }
}

#[tonic::async_trait]
impl Storage for Api {
    async fn list_pools(
        &self,
        request: Request<ListPoolsRequest>,
    ) -> Result<Response<ListPoolsResponse>, Status> {
        Caller::of(&request)?;
        let records = pools(&*self.node()?).await?;
        let pools = blocking(move || {
            Ok(records
                .into_iter()
                .map(|record| {
                    let usage = Pool::open(&record).and_then(|pool| pool.usage()).ok();
                    proto::v1::Pool {
                        name: record.name.to_string(),
                        kind: kind_word(record.kind).to_owned(),
                        path: record.path,
                        capacity_bytes: usage.as_ref().map(|usage| usage.capacity_bytes),
                        free_bytes: usage.as_ref().map(|usage| usage.free_bytes),
                    }
                })
                .collect())
        });
        Ok(Response::new(ListPoolsResponse { pools: pools.await? }))
    }

    async fn create_pool(
        &self,
        request: Request<CreatePoolRequest>,
    ) -> Result<Response<proto::v1::Pool>, Status> {
        let (node, caller) = (self.node()?, Caller::of(&request)?);
        let CreatePoolRequest { pool: wanted, create_folder } = request.into_inner();
        let wanted = wanted.ok_or_else(|| Status::invalid_argument("no pool is given"))?;
        let kind = match wanted.kind.as_str() {
            "local-dir" => PoolKind::LocalDir,
            "shared-dir" => PoolKind::SharedDir,
            other => {
                return Err(Status::invalid_argument(format!(
                    "`{other}` is not a kind of pool: use local-dir or shared-dir"
                )));
            }
        };
        let record =
            PoolRecord { name: parse_name(&wanted.name)?, kind, path: wanted.path.clone() };
        let wanted_folder = Wanted { make_folders: create_folder, ..Wanted::default() };
        let fields = [("kind", kind_word(record.kind)), ("path", record.path.as_str())];
        pool_entry(&record.name).add(&node, &caller, &fields, &wanted_folder).await?;
        tracing::info!(pool = %record.name, path = %record.path, user = %caller.user, "pool created");
        Ok(Response::new(wanted))
    }

    async fn list_images(
        &self,
        request: Request<ListImagesRequest>,
    ) -> Result<Response<ListImagesResponse>, Status> {
        Caller::of(&request)?;
        let records = pools(&*self.node()?).await?;
        let wanted = request.into_inner().pool;
        let names: Vec<proto::Name> = if wanted.is_empty() {
            records.iter().map(|record| record.name.clone()).collect()
        } else {
            vec![parse_name(&wanted)?]
        };
        let pools = Pools::new(records);
        let images = blocking(move || {
            let mut images = Vec::new();
            for name in names {
                let pool = match pools.open(&name) {
                    // One share that is not mounted here does not hide the other pools.
                    Err(_) if wanted.is_empty() => continue,
                    pool => pool?,
                };
                images.extend(pool.images()?.into_iter().map(|info| image(name.as_str(), info)));
            }
            Ok(images)
        });
        Ok(Response::new(ListImagesResponse { images: images.await? }))
    }

    async fn import_image(
        &self,
        request: Request<Streaming<ImportImageRequest>>,
    ) -> Result<Response<Image>, Status> {
        let (node, caller) = (self.node()?, Caller::of(&request)?);
        let mut messages = request.into_inner();
        let first = messages.message().await?.and_then(|message| message.header);
        let header =
            first.ok_or_else(|| Status::invalid_argument("the first message has no header"))?;
        let kind = (!header.kind.is_empty()).then(|| header.kind.parse::<ImageKind>()).transpose();
        let kind = kind.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let reference = format!("{}/{}", header.pool, header.name);
        let invalid = |error: proto::InvalidImage| Status::invalid_argument(error.to_string());
        let (pool, _) = parse_image(&reference).map_err(invalid)?;
        let pools = Pools::new(pools(&node).await?);
        let (name, size) = (header.name.clone(), header.size_bytes);
        let mut import: Import =
            blocking(move || pools.open(&pool)?.import(&name, (size > 0).then_some(size))).await?;
        // Dropped on any error: nothing is left of a broken import.
        while let Some(message) = messages.next().await {
            let data = message?.data;
            import = blocking(move || import.write(&data).map(|()| import)).await?;
        }
        let sha256 = header.sha256.clone();
        let info = blocking(move || import.commit(kind, &sha256)).await?;
        tracing::info!(image = %reference, bytes = info.size_bytes, user = %caller.user, "imported");
        Ok(Response::new(image(&header.pool, info)))
    }

    async fn delete_image(
        &self,
        request: Request<DeleteImageRequest>,
    ) -> Result<Response<DeleteImageResponse>, Status> {
        let (node, caller) = (self.node()?, Caller::of(&request)?);
        let message = request.into_inner();
        let reference = format!("{}/{}", message.pool, message.name);
        let invalid = |error: proto::InvalidImage| Status::invalid_argument(error.to_string());
        let (pool, _) = parse_image(&reference).map_err(invalid)?;
        for (vm, spec) in crate::vms::specs(&node).await? {
            if let Some(used) = crate::vms::image_uses(&spec).find(|used| used.image == reference) {
                return Err(Status::failed_precondition(format!(
                    "image `{reference}` is a {used} of VM `{vm}`: delete the VM first"
                )));
            }
        }
        let pools = Pools::new(pools(&node).await?);
        blocking(move || pools.open(&pool)?.delete(&message.name)).await?;
        tracing::info!(image = %reference, user = %caller.user, "deleted");
        Ok(Response::new(DeleteImageResponse {}))
    }

    async fn list_networks(
        &self,
        request: Request<ListNetworksRequest>,
    ) -> Result<Response<ListNetworksResponse>, Status> {
        Caller::of(&request)?;
        let node = self.node()?;
        let records = match node.store.networks(Consistency::Linearizable).await {
            Ok(records) => records,
            Err(_) => node.store.networks(Consistency::Stale).await?,
        };
        let network = |record: NetworkRecord| Network {
            name: record.name.to_string(),
            bridge: record.bridge,
            uplink: record.uplink,
        };
        let networks = records.into_iter().map(network).collect();
        Ok(Response::new(ListNetworksResponse { networks }))
    }

    async fn create_network(
        &self,
        request: Request<CreateNetworkRequest>,
    ) -> Result<Response<Network>, Status> {
        let (node, caller) = (self.node()?, Caller::of(&request)?);
        let wanted = request.into_inner().network;
        let wanted = wanted.ok_or_else(|| Status::invalid_argument("no network is given"))?;
        let name = parse_name(&wanted.name)?;
        let fields = [("bridge", wanted.bridge.as_str()), ("uplink", wanted.uplink.as_str())];
        network_entry(&name).add(&node, &caller, &fields, &Wanted::default()).await?;
        tracing::info!(network = %name, bridge = %wanted.bridge, user = %caller.user, "network created");
        Ok(Response::new(wanted))
    }

    async fn delete_pool(
        &self,
        request: Request<DeletePoolRequest>,
    ) -> Result<Response<DeletePoolResponse>, Status> {
        let (node, caller) = (self.node()?, Caller::of(&request)?);
        let name = parse_name(&request.into_inner().name)?;
        pool_entry(&name).remove(&node, &caller).await?;
        Ok(Response::new(DeletePoolResponse {}))
    }

    async fn delete_network(
        &self,
        request: Request<DeleteNetworkRequest>,
    ) -> Result<Response<DeleteNetworkResponse>, Status> {
        let (node, caller) = (self.node()?, Caller::of(&request)?);
        let name = parse_name(&request.into_inner().name)?;
        network_entry(&name).remove(&node, &caller).await?;
        Ok(Response::new(DeleteNetworkResponse {}))
    }
}

fn pool_entry(name: &Name) -> Entry<'_> {
    Entry { document: keys::STORAGE_DOCUMENT, section: "pools", noun: "pool", name }
}

fn network_entry(name: &Name) -> Entry<'_> {
    Entry { document: keys::NETWORKS_DOCUMENT, section: "networks", noun: "network", name }
}
