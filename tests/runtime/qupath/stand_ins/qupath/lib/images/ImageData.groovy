package qupath.lib.images

import qupath.lib.images.servers.ImageServer
import qupath.lib.objects.hierarchy.PathObjectHierarchy

class ImageData {

    ImageServer server
    private PathObjectHierarchy hierarchy = new PathObjectHierarchy()

    ImageServer getServer() { server }

    PathObjectHierarchy getHierarchy() { hierarchy }

}
